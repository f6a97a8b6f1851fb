package config

import "strings"

// token is a word, a string, or a brace.
type token struct {
	text   string
	col    int // from 1
	quoted bool
}

func (t token) is(brace string) bool { return !t.quoted && t.text == brace }

// remark is what the lexer has to say about a line.
type remark struct {
	col     int
	text    string
	warning bool
}

// blank follows multipath.conf: white space and every byte beyond ASCII.
func blank(c byte) bool { return c == ' ' || c >= '\t' && c <= '\r' || c > 127 }

// lex splits one line into words. Outside quotes a word ends at a blank, a
// quote, a brace or a comment; `#` and `!` begin a comment wherever they
// stand. Two quotes inside a string mean one. There are no escapes.
func lex(line string) (toks []token, remarks []remark) {
	odd := false
	for i := 0; i < len(line); {
		c := line[i]
		switch {
		case blank(c):
			if c > 127 && !odd && !strings.HasPrefix(line, "\ufeff") {
				odd = true
				remarks = append(remarks, remark{i + 1, "a byte beyond ASCII counts as a blank outside quotes", true})
			}
			i++
		case c == '#' || c == '!':
			if i > 0 && len(toks) > 0 && !blank(line[i-1]) && !toks[len(toks)-1].quoted && !strings.ContainsRune("{}", rune(line[i-1])) {
				remarks = append(remarks, remark{i + 1, "`" + string(c) + "` begins a comment here and cuts the word: put the value in quotes if it is meant", true})
			}
			return toks, remarks
		case c == '{' || c == '}':
			toks = append(toks, token{text: line[i : i+1], col: i + 1})
			i++
		case c == '"':
			var s strings.Builder
			start, closed := i, false
			for i++; i < len(line); i++ {
				if line[i] != '"' {
					s.WriteByte(line[i])
				} else if i+1 < len(line) && line[i+1] == '"' {
					s.WriteByte('"')
					i++
				} else {
					closed = true
					i++
					break
				}
			}
			if !closed {
				remarks = append(remarks, remark{start + 1, "the string has no end: add a `\"`", false})
			}
			toks = append(toks, token{text: s.String(), col: start + 1, quoted: true})
		case c < ' ' || c == 0x7f:
			remarks = append(remarks, remark{i + 1, "a control character: this is no text file", false})
			return toks, remarks
		default:
			start := i
			for i < len(line) && !blank(line[i]) && line[i] > ' ' && !strings.ContainsRune(`"{}#!`, rune(line[i])) {
				i++
			}
			toks = append(toks, token{text: line[start:i], col: start + 1})
		}
	}
	return toks, remarks
}
