// Package config reads multipath.conf: the grammar of multipath-tools, with
// what it loses in silence turned into errors, and the sections initiator and
// nbd of mpathd. It knows nothing of sessions and maps.
package config

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"

	"github.com/mpathd/mpathd/selector/prio"
)

const (
	maxFile = 1 << 20 // bytes
	maxLine = 16 << 10
)

// Section is the settings of one block, by keyword as written, quotes removed.
type Section map[string]string

// Criteria is a blacklist or its exceptions; Config.Blacklisted applies both.
type Criteria struct {
	Devnode, WWID, Property, Protocol []string  // POSIX extended regular expressions
	Device                            []Section // vendor, product
}

// Initiator is the section of that name.
type Initiator struct {
	Settings Section
	Discover []string  // portals, as written
	Target   []Section // url, and CHAP settings of its own
}

// Config is a whole configuration as written: sections that a file has several
// times are joined. For says what it means for a unit.
type Config struct {
	Defaults   Section
	Blacklist  Criteria
	Exceptions Criteria
	Devices    []Section // of devices, in order; the built-in table is not among them
	Multipaths []Section
	Overrides  Section
	Initiator  Initiator
	NBD        Section

	// With Errors the configuration must not be used; Warnings it means no harm.
	Errors, Warnings []*Diagnostic

	// Where the sections of the lists above and their settings stand, for what
	// only the whole file tells. Those of the same index belong together.
	devicesAt, multipathsAt, targetsAt []places
	// firstAt is where each setting first stands that is not switched off.
	firstAt places
}

// together are settings of which each needs all others.
var together = [][]string{
	{"san_path_err_threshold", "san_path_err_forget_rate", "san_path_err_recovery_time"},
	{"marginal_path_double_failed_time", "marginal_path_err_sample_time", "marginal_path_err_rate_threshold", "marginal_path_err_recheck_gap_time"},
	{"delay_watch_checks", "delay_wait_checks"},
}

// place is where something was written, and the line.
type place struct {
	Pos
	src string
}

// places are those of the settings of a section by keyword; "" is its own.
type places map[string]place

// block is an open section.
type block struct {
	name  string
	scope string // of options, or "" for another kind
	into  Section
	list  *Criteria
	pos   Pos
	src   string
	at    places      // of what it has set so far
	prio  *Diagnostic // about its last prio or prio_args, if it has one
}

type parser struct {
	c       *Config
	file    string
	line    int
	src     string
	stack   []block
	skip    int   // depth of an unknown section
	skipped block // that section
}

// Load reads the configuration of a host: the file, and for one named
// multipath.conf the files *.conf of conf.d in multipath/ beside it, in the
// order of their names; what comes later wins.
func Load(path string) (*Config, error) {
	c := &Config{Defaults: Section{}, Overrides: Section{}, NBD: Section{}, Initiator: Initiator{Settings: Section{}}}
	if err := c.read(path); err != nil {
		return nil, err
	}
	if filepath.Base(path) == "multipath.conf" {
		more, _ := filepath.Glob(filepath.Join(filepath.Dir(path), "multipath", "conf.d", "*.conf"))
		sort.Strings(more)
		for _, m := range more {
			if err := c.read(m); err != nil {
				return nil, err
			}
		}
	}
	c.finish()
	return c, nil
}

// Parse reads one file's text.
func Parse(name, text string) *Config {
	c := &Config{Defaults: Section{}, Overrides: Section{}, NBD: Section{}, Initiator: Initiator{Settings: Section{}}}
	c.parse(name, text)
	c.finish()
	return c
}

func (c *Config) read(path string) error {
	st, err := os.Stat(path)
	if err == nil && st.Size() > maxFile {
		err = fmt.Errorf("larger than %d bytes", maxFile)
	}
	if err == nil && !st.Mode().IsRegular() {
		err = errors.New("not a regular file")
	}
	var b []byte
	if err == nil {
		b, err = os.ReadFile(path)
	}
	if err != nil {
		var pe *fs.PathError
		if errors.As(err, &pe) {
			err = pe.Err
		}
		return fmt.Errorf("configuration %s: %w", path, err)
	}
	c.parse(path, string(b))
	return nil
}

// lineEnds makes one kind of all: a lone CR ends a line too.
var lineEnds = strings.NewReplacer("\r\n", "\n", "\r", "\n")

func (c *Config) parse(name, text string) {
	p := &parser{c: c, file: name}
	for _, l := range strings.Split(lineEnds.Replace(text), "\n") {
		p.line++
		p.src = l
		if len(p.src) > maxLine {
			p.fail(1, "the line is longer than %d bytes", maxLine)
			continue
		}
		p.one(p.src)
	}
	if p.skip > 0 { // it has swallowed the rest of the file
		p.stack = append(p.stack, p.skipped)
	}
	for _, b := range p.stack {
		c.Errors = append(c.Errors, &Diagnostic{Pos: b.pos, Text: "the section " + b.name + " is not closed: add a line with `}`", Source: b.src})
	}
}

func (p *parser) note(warning bool, col int, format string, a ...any) {
	d := &Diagnostic{Pos: Pos{p.file, p.line, col}, Text: Redact(fmt.Sprintf(format, a...)), Source: printable(p.src), Warning: warning}
	if warning {
		p.c.Warnings = append(p.c.Warnings, d)
	} else {
		p.c.Errors = append(p.c.Errors, d)
	}
}

func (p *parser) fail(col int, format string, a ...any) { p.note(false, col, format, a...) }
func (p *parser) warn(col int, format string, a ...any) { p.note(true, col, format, a...) }

func (p *parser) one(line string) {
	toks, remarks := lex(line)
	for _, r := range remarks {
		p.note(r.warning, r.col, "%s", r.text)
	}
	if len(toks) == 0 {
		return
	}
	switch t := toks[0]; {
	case t.is("}"):
		if len(toks) > 1 {
			p.fail(toks[1].col, "nothing may follow `}` on its line: it would be lost")
		}
		if p.skip == 0 && len(p.stack) == 0 {
			p.fail(t.col, "`}` closes nothing")
			return
		}
		p.close()
	case t.is("{"):
		p.fail(t.col, "`{` belongs on the line of its section's name")
	case len(toks) > 1 && toks[1].is("{"):
		if len(toks) > 2 {
			if p.open(t); p.owned() {
				p.pairs(toks[2:])
				return
			}
			p.fail(toks[2].col, "nothing may follow `{` on its line: it would be lost, and the section stay open")
			if toks[len(toks)-1].is("}") { // the reader meant it closed
				p.close()
			}
			return
		}
		p.open(t)
	case p.skip > 0:
	case p.owned():
		p.pairs(toks)
	default:
		p.setting(t, toks[1:])
	}
}

// close leaves the section that is open.
func (p *parser) close() {
	if p.skip > 0 {
		p.skip--
	} else {
		p.checkPrio(&p.stack[len(p.stack)-1])
		p.stack = p.stack[:len(p.stack)-1]
	}
}

// checkPrio warns where the prioritizer that a section asks for does not take
// its arguments.
func (p *parser) checkPrio(b *block) {
	if b.prio == nil || b.into["prio"] == "" {
		return
	}
	args := b.into["prio_args"]
	if args == "" {
		args = p.c.Defaults["prio_args"]
	}
	if _, err := prio.New(b.into["prio"], args); err != nil {
		b.prio.Text = fmt.Sprintf("%v: what the unit supports is used instead", err)
		p.c.Warnings = append(p.c.Warnings, b.prio)
	}
}

// open enters a section.
func (p *parser) open(t token) {
	if p.skip > 0 {
		p.skip++
		return
	}
	c, parent := p.c, ""
	if len(p.stack) > 0 {
		parent = p.stack[len(p.stack)-1].name
	}
	b := block{name: t.text, pos: Pos{p.file, p.line, t.col}, src: printable(p.src)}
	b.at = places{"": {b.pos, b.src}}
	switch parent + "/" + t.text {
	case "/defaults":
		b.scope, b.into = "D", c.Defaults
	case "/overrides":
		b.scope, b.into = "O", c.Overrides
	case "overrides/protocol":
		b.scope, b.into = "P", Section{}
	case "/blacklist", "/devnode_blacklist":
		b.name, b.list = "blacklist", &c.Blacklist
	case "/blacklist_exceptions":
		b.list = &c.Exceptions
	case "blacklist/device", "blacklist_exceptions/device":
		s := Section{}
		l := p.stack[len(p.stack)-1].list
		l.Device = append(l.Device, s)
		b.name, b.scope, b.into = parent+" device", "V", s
	case "/devices", "/multipaths":
	case "devices/device":
		b.scope, b.into = "V", Section{}
		c.Devices, c.devicesAt = append(c.Devices, b.into), append(c.devicesAt, b.at)
	case "multipaths/multipath":
		b.scope, b.into = "M", Section{}
		c.Multipaths, c.multipathsAt = append(c.Multipaths, b.into), append(c.multipathsAt, b.at)
	case "/initiator":
		b.into = c.Initiator.Settings
	case "initiator/target":
		b.into = Section{}
		b.name = "target"
		c.Initiator.Target, c.targetsAt = append(c.Initiator.Target, b.into), append(c.targetsAt, b.at)
	case "/nbd":
		b.into = c.NBD
	default:
		p.skip = 1
		p.skipped = block{name: t.text, pos: Pos{p.file, p.line, t.col}, src: p.src}
		if parent == "" {
			parent = "the top level"
		}
		p.warn(t.col, "unknown section %q in %s is skipped%s", t.text, parent, hint(t.text, sections))
		return
	}
	p.stack = append(p.stack, b)
}

var sections = []string{"defaults", "blacklist", "blacklist_exceptions", "devices", "device", "multipaths", "multipath", "overrides", "protocol", "initiator", "target", "nbd"}

func hint(word string, list []string) string {
	if n := nearest(word, list); n != "" {
		return fmt.Sprintf(": is %q meant?", n)
	}
	return ""
}

func (p *parser) setting(t token, args []token) {
	if len(p.stack) == 0 {
		if slices.Contains(sections, t.text) {
			p.fail(t.col, "`{` is missing behind %s", t.text)
		} else {
			p.warn(t.col, "%q stands outside of every section and is ignored%s", t.text, hint(t.text, sections))
		}
		return
	}
	b := &p.stack[len(p.stack)-1]
	if len(args) == 0 {
		if slices.Contains(sections, t.text) {
			p.fail(t.col, "`{` is missing behind %s", t.text)
		} else {
			p.fail(t.col, "%s has no value", t.text)
		}
		return
	}
	if len(args) > 1 && p.idle(b, t.text) { // nothing of it has a meaning
		var words []string
		for _, a := range args {
			words = append(words, a.text)
		}
		args = []token{{strings.Join(words, " "), args[0].col, true}}
	}
	v := args[0].text
	if len(args) > 1 {
		p.fail(args[1].col, "only one value is read, this would be lost: put quotes around the whole value of %s", t.text)
		return
	}
	switch {
	case b.list != nil:
		p.criterion(b.list, t, args[0])
	case b.scope != "":
		p.option(b, t, args[0])
	case b.name == "initiator" || b.name == "target":
		p.initiator(b, t, args[0], v)
	case b.name == "nbd":
		p.nbd(b, t, args[0], v)
	default:
		p.warn(t.col, "%q is no section of %s and is ignored", t.text, b.name)
	}
}

// idle tells whether a keyword of the section is one that does nothing here.
func (p *parser) idle(b *block, name string) bool {
	if s, ok := synonyms[name]; ok {
		name = s
	}
	o := find(name, b.scope)
	return b.scope != "" && o != nil && o.idle != ""
}

func (p *parser) criterion(l *Criteria, t, v token) {
	into := map[string]*[]string{"devnode": &l.Devnode, "wwid": &l.WWID, "property": &l.Property, "protocol": &l.Protocol}[t.text]
	if into == nil {
		p.warn(t.col, "unknown keyword %q is ignored%s", t.text, hint(t.text, []string{"devnode", "wwid", "property", "protocol", "device"}))
		return
	}
	if err := pattern(v.text); err != nil {
		p.fail(v.col, "%v", err)
		return
	}
	*into = append(*into, v.text)
}

func (p *parser) option(b *block, t, v token) {
	name := t.text
	if s, ok := synonyms[name]; ok {
		name = s
	}
	o := find(name, b.scope)
	if len(p.stack) > 1 && p.stack[len(p.stack)-2].list != nil && name != "vendor" && name != "product" {
		o = nil // a blacklist's device has these two alone: a third would narrow it
	}
	if o == nil {
		for _, x := range options {
			if x.name == name {
				p.warn(t.col, "%s has no meaning in %s and is ignored", t.text, b.name)
				return
			}
		}
		p.warn(t.col, "unknown keyword %q is ignored%s", t.text, hint(t.text, names(b.scope)))
		return
	}
	if err := o.check(v.text); err != nil {
		var w warn
		if errors.As(err, &w) {
			p.warn(v.col, "%s: %v", t.text, err)
		} else {
			p.fail(v.col, "%s: %v", t.text, err)
		}
		return
	}
	if k, _ := meaning(name, v.text); o.idle != "" && k == name {
		p.warn(t.col, "%s does nothing here: %s", t.text, o.idle)
	}
	p.set(b, t, v.text)
	if _, have := p.c.firstAt[name]; !have && v.text != "no" && v.text != "0" {
		if p.c.firstAt == nil {
			p.c.firstAt = places{}
		}
		p.c.firstAt[name] = b.at[t.text]
	}
	if name == "prio" || name == "prio_args" {
		b.prio = &Diagnostic{Pos: Pos{p.file, p.line, v.col}, Source: printable(p.src), Warning: true}
	}
}

// set is a setting of the section that is open. A section that is opened again,
// perhaps by a file of conf.d, may say something else without a warning: that is
// what it is for.
func (p *parser) set(b *block, t token, v string) {
	for k, before := range b.at {
		if x, ok := b.into[k]; ok && sameSetting(k, x, t.text, v) {
			p.warn(t.col, "%s is set twice in this section, in line %d too: the later one wins", t.text, before.Line)
		}
	}
	b.into.put(t.text, v)
	b.at[t.text] = place{Pos{p.file, p.line, t.col}, printable(p.src)}
}

func sameSetting(keyword, value, other, x string) bool {
	a, _ := meaning(keyword, value)
	b, _ := meaning(other, x)
	return a == b
}

// finish checks what only the whole tells, and merges entries of one thing.
func (c *Config) finish() {
	bad := func(at place, format string, a ...any) {
		c.Errors = append(c.Errors, &Diagnostic{Text: fmt.Sprintf(format, a...), Pos: at.Pos, Source: at.src})
	}
	c.Multipaths, c.multipathsAt = merge(c.Multipaths, c.multipathsAt, []string{"wwid"}, nil, func(at places) {
		bad(at[""], "a multipath section has no wwid: nothing tells which disk it is about")
	})
	c.Devices, c.devicesAt = merge(c.Devices, c.devicesAt, []string{"vendor", "product"}, []string{"revision"}, func(at places) {
		bad(at[""], "a device section needs both vendor and product")
	})
	for _, key := range []string{"alias", "nbd_device"} {
		first := map[string]int{}
		for i, m := range c.Multipaths {
			if m[key] == "" {
				continue
			}
			if j, ok := first[m[key]]; ok {
				other := c.multipathsAt[j][key]
				bad(c.multipathsAt[i][key], "%s %s is given to both %s (%s) and %s", key, m[key], c.Multipaths[j]["wwid"], other, m["wwid"])
				continue
			}
			first[m[key]] = i
		}
	}
	for _, family := range together {
		var has, lacks []string
		for _, k := range family {
			if _, ok := c.firstAt[k]; ok {
				has = append(has, k)
			} else {
				lacks = append(lacks, k)
			}
		}
		if len(has) > 0 && len(lacks) > 0 {
			at := c.firstAt[has[0]]
			c.Warnings = append(c.Warnings, &Diagnostic{Pos: at.Pos, Source: at.src, Warning: true, Text: has[0] + " does nothing without " + strings.Join(lacks, " and ")})
		}
	}
	for i, t := range c.Initiator.Target {
		if t["url"] == "" {
			bad(c.targetsAt[i][""], "a target block has no url")
		}
	}
}

// merge makes one section of those that are about the same thing, as the values
// of the keywords need and more tell, in the place of the last: what comes later
// wins, over others that match too. One that lacks something that it needs is dropped and reported.
func merge(list []Section, at []places, need, more []string, lacks func(places)) (out []Section, outAt []places) {
	for i, s := range list {
		if slices.ContainsFunc(need, func(k string) bool { return s[k] == "" }) {
			lacks(at[i])
			continue
		}
		j := slices.IndexFunc(out, func(x Section) bool {
			return !slices.ContainsFunc(slices.Concat(need, more), func(k string) bool { return x[k] != s[k] })
		})
		one, oneAt := s, at[i]
		if j >= 0 {
			one, oneAt = out[j], outAt[j]
			for k, v := range s {
				one.put(k, v)
			}
			maps.Copy(oneAt, at[i])
			out, outAt = slices.Delete(out, j, j+1), slices.Delete(outAt, j, j+1)
		}
		out, outAt = append(out, one), append(outAt, oneAt)
	}
	return out, outAt
}

// Err is the first error, with the line and a caret, or nil.
func (c *Config) Err() error {
	if len(c.Errors) == 0 {
		return nil
	}
	return c.Errors[0]
}
