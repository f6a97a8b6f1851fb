package config

import (
	"fmt"
	"regexp"
	"strings"
	"unicode/utf8"
)

// Pos is a place in a file, or the name of another origin with Line 0
// (a flag, "built-in").
type Pos struct {
	File      string
	Line, Col int // from 1; Col counts bytes
}

func (p Pos) String() string {
	if p.Line == 0 {
		return p.File
	}
	return fmt.Sprintf("%s:%d", p.File, p.Line)
}

// Diagnostic is an error or a warning about a place in a configuration.
type Diagnostic struct {
	Pos
	Text    string // what is wrong and what to do
	Source  string // the line, without secrets; may be empty
	Warning bool
}

// Error is the message on one line, as compilers print it.
func (d *Diagnostic) Error() string { return d.Pos.String() + ": " + d.Text }

// Detail is Error with the line and a caret under the place.
func (d *Diagnostic) Detail() string {
	kind := "error: "
	if d.Warning {
		kind = "warning: "
	}
	out := d.Pos.String() + ": " + kind + d.Text
	if d.Source == "" {
		return out
	}
	var lead strings.Builder
	for i, r := range d.Source {
		if i >= d.Col-1 {
			break
		}
		if r != '\t' {
			r = ' '
		}
		lead.WriteRune(r)
	}
	return out + "\n    " + d.Source + "\n    " + lead.String() + "^"
}

var secretInURL = regexp.MustCompile(`(iscsi://[^%@/\s"]*)%[^\s"]*@`)

// Redact replaces the secret of every PATH-URL in s.
func Redact(s string) string { return secretInURL.ReplaceAllString(s, "${1}%***@") }

// printable is a source line for a terminal: no secret, no control character
// but the tab, at most 200 bytes.
func printable(line string) string {
	line = Redact(line)
	if len(line) > 200 {
		line = line[:200]
	}
	if !utf8.ValidString(line) {
		line = strings.ToValidUTF8(line, "?")
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' && r != '\t' || r == 0x7f {
			return '?'
		}
		return r
	}, line)
}

// nearest is the word of list that s may have meant, or "".
func nearest(s string, list []string) string {
	if len(s) > 40 {
		return ""
	}
	best, bestAt := "", 1+max(2, len(s)/4)
	for _, w := range list {
		if d := distance(s, w); d < bestAt {
			best, bestAt = w, d
		}
	}
	return best
}

// distance is the number of letters to insert, drop or change (Levenshtein).
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
