// Package config reads multipath.conf: the grammar of multipath-tools, with
// what it loses in silence turned into errors, and the sections initiator and
// nbd of mpathd. It knows nothing of sessions and maps.
package config

import (
	"errors"
	"fmt"
	"io/fs"
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

// Section is the settings of one block, by keyword.
type Section map[string]string

// Criteria is a blacklist or its exceptions.
type Criteria struct {
	Devnode, WWID, Property, Protocol []string
	Device                            []Section
}

// Initiator is the section of that name.
type Initiator struct {
	Settings Section
	Discover []string
	Target   []Section // url, and CHAP settings of its own
}

// Config is a whole configuration as written.
type Config struct {
	Defaults   Section
	Blacklist  Criteria
	Exceptions Criteria
	Devices    []Section
	Multipaths []Section
	Overrides  Section
	Initiator  Initiator
	NBD        Section

	Errors, Warnings []*Diagnostic
}

// block is an open section.
type block struct {
	name  string
	scope string // of options, or "" for another kind
	into  Section
	list  *Criteria
	pos   Pos
	src   string
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

func (c *Config) parse(name, text string) {
	p := &parser{c: c, file: name}
	for _, l := range strings.Split(text, "\n") {
		p.line++
		p.src = strings.TrimRight(l, "\r")
		if len(p.src) > maxLine {
			p.fail(1, "the line is longer than %d bytes", maxLine)
			continue
		}
		p.one(strings.ReplaceAll(p.src, "\r", " "))
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
		b.scope, b.into = "V", s
	case "/devices", "/multipaths":
	case "devices/device":
		b.scope, b.into = "V", Section{}
		c.Devices = append(c.Devices, b.into)
	case "multipaths/multipath":
		b.scope, b.into = "M", Section{}
		c.Multipaths = append(c.Multipaths, b.into)
	case "/initiator":
		b.into = c.Initiator.Settings
	case "initiator/target":
		b.into = Section{}
		b.name = "target"
		c.Initiator.Target = append(c.Initiator.Target, b.into)
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
	if o.idle != "" {
		p.warn(t.col, "%s does nothing here: %s", t.text, o.idle)
	}
	if _, twice := b.into[t.text]; twice && !(b.scope == "D" || b.scope == "O") {
		p.warn(t.col, "%s is set twice in this section: the later one wins", t.text)
	}
	b.into[t.text] = v.text
	if name == "prio" || name == "prio_args" {
		b.prio = &Diagnostic{Pos: Pos{p.file, p.line, v.col}, Source: printable(p.src), Warning: true}
	}
}

// finish checks what only the whole tells, and merges entries of one thing.
func (c *Config) finish() {
	bad := func(text string) {
		c.Errors = append(c.Errors, &Diagnostic{Text: text, Pos: Pos{File: "configuration"}})
	}
	var merged []Section
	for _, m := range c.Multipaths {
		if m["wwid"] == "" {
			bad("a multipath section has no wwid: nothing tells which disk it is about")
			continue
		}
		i := slices.IndexFunc(merged, func(x Section) bool { return x["wwid"] == m["wwid"] })
		if i < 0 {
			merged = append(merged, m)
			continue
		}
		for k, v := range m {
			merged[i][k] = v
		}
	}
	c.Multipaths = merged
	devices := map[string]string{}
	aliases := map[string]string{}
	for _, m := range c.Multipaths {
		for key, seen := range map[string]map[string]string{"alias": aliases, "nbd_device": devices} {
			if v := m[key]; v != "" {
				if other, ok := seen[v]; ok {
					bad(fmt.Sprintf("%s %s is given to both %s and %s", key, v, other, m["wwid"]))
				}
				seen[v] = m["wwid"]
			}
		}
	}
	var ds []Section
	for _, d := range c.Devices {
		if d["vendor"] == "" || d["product"] == "" {
			bad("a device section needs both vendor and product")
			continue
		}
		i := slices.IndexFunc(ds, func(x Section) bool {
			return x["vendor"] == d["vendor"] && x["product"] == d["product"] && x["revision"] == d["revision"]
		})
		if i < 0 {
			ds = append(ds, d)
			continue
		}
		for k, v := range d {
			ds[i][k] = v
		}
	}
	c.Devices = ds
	for _, t := range c.Initiator.Target {
		if t["url"] == "" {
			bad("a target block has no url")
		}
	}
}

// Err is the first error, with the line and a caret, or nil.
func (c *Config) Err() error {
	if len(c.Errors) == 0 {
		return nil
	}
	return c.Errors[0]
}
