# Prints what libdmmp, the client library of multipath-tools, reads of the daemon
# behind its socket: one line for each map, group and path.
# Usage: dmmp.py DIRECTORY-OF-LIBRARIES
import ctypes
import sys

lib = sys.argv[1]
ctypes.CDLL(lib + "/libmpathcmd.so.0", mode=ctypes.RTLD_GLOBAL)
dmmp = ctypes.CDLL(lib + "/libdmmp.so.0.2.0")
handle, number, text = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_char_p


def call(name, result, *args):
    f = getattr(dmmp, "dmmp_" + name)
    f.restype = result
    return f(*args)


def array(name, of):
    list, n = ctypes.POINTER(handle)(), number()
    error = call(name, ctypes.c_int, handle(of), ctypes.byref(list), ctypes.byref(n))
    return error, [handle(list[i]) for i in range(n.value)]


def say(*words):
    print(*[w.decode() if isinstance(w, bytes) else w for w in words])


context = call("context_new", handle)
error, maps = array("mpath_array_get", context)
if error:
    sys.exit("libdmmp: %s" % call("last_error_msg", text, handle(context)))
for m in maps:
    say("map", call("mpath_name_get", text, m), call("mpath_wwid_get", text, m), call("mpath_kdev_name_get", text, m))
    for g in array("path_group_array_get", m.value)[1]:
        status = call("path_group_status_str", text, call("path_group_status_get", number, g))
        say("group", call("path_group_id_get", number, g), call("path_group_priority_get", number, g), status)
        for p in array("path_array_get", g.value)[1]:
            say("path", call("path_blk_name_get", text, p), call("path_status_str", text, call("path_status_get", number, p)))
