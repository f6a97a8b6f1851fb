package config

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"unicode/utf8"
)

const maxPattern = 1024 // bytes

// compile makes a Go expression of a POSIX extended one as glibc reads it, for
// matching anywhere: a backslash in brackets is itself, a repetition with
// nothing before it is skipped (`*` alone matches everything), `\<` and `\>`
// are word boundaries.
func compile(pattern string) (*regexp.Regexp, error) {
	switch {
	case len(pattern) > maxPattern:
		return nil, fmt.Errorf("longer than %d bytes", maxPattern)
	case !utf8.ValidString(pattern):
		return nil, errors.New("not UTF-8")
	}
	out := strings.Builder{}
	out.WriteString("(?s)")
	var last byte // the repetition just written, 0 after an atom, 1 where none may stand
	last = 1
	for i := 0; i < len(pattern); {
		c := pattern[i]
		switch c {
		case '*', '+', '?':
			i++
			switch {
			case last == 1:
			case last == 0:
				out.WriteByte(c)
				last = c
			case last != c: // two different ones in a row: any number
				s := out.String()
				out.Reset()
				out.WriteString(s[:len(s)-1] + "*")
				last = '*'
			}
			continue
		case '(', '|':
			out.WriteByte(c)
			last = 1
		case '^':
			out.WriteByte(c)
			last = 1
		case '{':
			end := strings.IndexByte(pattern[i:], '}')
			if end < 0 || strings.Trim(pattern[i+1:i+end], "0123456789,") != "" || last != 0 {
				out.WriteString(`\{`)
				last = 0
				break
			}
			if out.WriteByte(c); pattern[i+1] == ',' { // for Go a literal
				out.WriteByte('0')
			}
			out.WriteString(pattern[i+1 : i+end+1])
			i += end + 1
			last = '*' // no further repetition after it
			continue
		case '[':
			n, class, err := bracket(pattern[i:])
			if err != nil {
				return nil, err
			}
			out.WriteString(class)
			i += n
			last = 0
			continue
		case '\\':
			if i+1 == len(pattern) {
				return nil, errors.New("a backslash at the end")
			}
			i++
			e := pattern[i]
			switch {
			case e >= '1' && e <= '9':
				return nil, errors.New("back-references are not supported")
			case strings.IndexByte("wWsSbB", e) >= 0:
				out.WriteString(`\` + string(e))
			case e == '<' || e == '>':
				out.WriteString(`\b`)
			default:
				r, n := utf8.DecodeRuneInString(pattern[i:])
				out.WriteString(regexp.QuoteMeta(string(r)))
				i += n - 1
			}
			last = 0
		default:
			out.WriteByte(c)
			last = 0
		}
		i++
	}
	re, err := regexp.Compile(out.String())
	if err != nil {
		text := strings.TrimPrefix(err.Error(), "error parsing regexp: ")
		return nil, errors.New(text)
	}
	return re, nil
}

// bracket translates the bracket expression that s begins with and gives its
// length.
func bracket(s string) (n int, class string, err error) {
	var b strings.Builder
	b.WriteByte('[')
	i := 1
	if i < len(s) && s[i] == '^' {
		b.WriteByte('^')
		i++
	}
	for first := true; ; first = false {
		if i >= len(s) {
			return 0, "", errors.New("missing ]")
		}
		switch c := s[i]; {
		case c == ']' && !first:
			b.WriteByte(']')
			return i + 1, b.String(), nil
		case c == '[' && i+1 < len(s) && s[i+1] == ':':
			end := strings.Index(s[i:], ":]")
			if end < 0 {
				return 0, "", errors.New("missing :]")
			}
			b.WriteString(s[i : i+end+2])
			i += end + 2
		case c == '[' && i+1 < len(s) && (s[i+1] == '.' || s[i+1] == '='):
			return 0, "", errors.New("collating elements are not supported")
		case strings.IndexByte(`\[]^`, c) >= 0:
			b.WriteString(`\` + string(c))
			i++
		default:
			b.WriteByte(c)
			i++
		}
	}
}
