// Package compat speaks to those who know multipath-tools: its commands, its
// output and its socket protocol, over the state of this daemon.
package compat

import (
	"slices"
	"strings"
)

// key is a word of the command language; those with a parameter take the word
// after them.
type key struct {
	words []string // synonyms, the first names it
	param bool
}

var keys = []key{
	{[]string{"list", "show"}, false}, {[]string{"add"}, false}, {[]string{"remove", "del"}, false}, {[]string{"switch", "switchgroup"}, false},
	{[]string{"suspend"}, false}, {[]string{"resume"}, false}, {[]string{"reinstate"}, false}, {[]string{"fail"}, false}, {[]string{"resize"}, false},
	{[]string{"reset"}, false}, {[]string{"reload"}, false}, {[]string{"forcequeueing"}, false}, {[]string{"disablequeueing"}, false},
	{[]string{"restorequeueing"}, false}, {[]string{"paths"}, false}, {[]string{"maps", "multipaths"}, false}, {[]string{"path"}, true},
	{[]string{"map", "multipath"}, true}, {[]string{"group"}, true}, {[]string{"reconfigure"}, false}, {[]string{"daemon"}, false},
	{[]string{"status"}, false}, {[]string{"stats"}, false}, {[]string{"topology"}, false}, {[]string{"config"}, false}, {[]string{"blacklist"}, false},
	{[]string{"devices"}, false}, {[]string{"raw"}, false}, {[]string{"wildcards"}, false}, {[]string{"quit", "exit"}, false},
	{[]string{"shutdown"}, false}, {[]string{"getprstatus"}, false}, {[]string{"setprstatus"}, false}, {[]string{"unsetprstatus"}, false},
	{[]string{"format"}, true}, {[]string{"json"}, false}, {[]string{"getprhold"}, false}, {[]string{"setprhold"}, false}, {[]string{"unsetprhold"}, false},
	{[]string{"getprkey"}, false}, {[]string{"setprkey"}, false}, {[]string{"unsetprkey"}, false},
	{[]string{"key"}, true}, {[]string{"local"}, false}, {[]string{"setmarginal"}, false}, {[]string{"unsetmarginal"}, false}, {[]string{"all"}, false},
	{[]string{"help"}, false},
}

// split cuts a command into words. A quoted part is one word, its quotes gone.
func split(cmd string) (words []string) {
	for {
		cmd = strings.TrimLeft(cmd, " \t\r\n")
		if cmd == "" {
			return words
		}
		if cmd[0] == '"' {
			word, rest, _ := strings.Cut(cmd[1:], `"`)
			words, cmd = append(words, word), rest
			continue
		}
		end := strings.IndexAny(cmd, " \t\r\n")
		if end < 0 {
			end = len(cmd)
		}
		words, cmd = append(words, cmd[:end]), cmd[end:]
	}
}

// find is the key that a word means: exactly, or as the beginning of one only.
func find(word string) *key {
	var found *key
	for i := range keys {
		for _, w := range keys[i].words {
			if w == word {
				return &keys[i]
			}
			if strings.HasPrefix(w, word) {
				if found != nil {
					return nil // of two, even if they mean the same
				}
				found = &keys[i]
			}
		}
	}
	return found
}

// command is a parsed command: its words in any order, as the peer takes them.
type command struct {
	name   string // names of the keys, sorted, with spaces
	params map[string]string
}

// parse reports whether every word is known and has its parameter.
func parse(text string) (c command, ok bool) {
	c.params = map[string]string{}
	words := split(text)
	var names []string
	for i := 0; i < len(words); i++ {
		k := find(words[i])
		if k == nil || words[i] == "" {
			return c, false
		}
		names = append(names, k.words[0])
		if k.param {
			if i++; i == len(words) {
				return c, false
			}
			c.params[k.words[0]] = words[i]
		}
	}
	slices.Sort(names)
	c.name = strings.Join(names, " ")
	return c, len(names) > 0
}

// Unprivileged tells whether any user may give the command: those that only
// look.
func Unprivileged(cmd string) bool {
	words := split(cmd)
	if len(words) == 0 {
		return true
	}
	k := find(words[0])
	return k != nil && slices.Contains([]string{"list", "help", "quit"}, k.words[0])
}
