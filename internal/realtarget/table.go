package realtarget

import (
	"fmt"
	"os"
	"strings"
)

// RowPrefix marks a row on the output of a test that runs in the lab's machine,
// from where it cannot write the file itself.
const RowPrefix = "table-row: "

// PutRow puts a row of a Markdown table between the lines "<!-- NAME -->" and
// "<!-- end -->" of a file, in place of the one whose first key cells are the
// same, else at the table's end.
func PutRow(file, name, row string, key int) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	head, rest, ok := strings.Cut(string(text), "<!-- "+name+" -->\n")
	table, tail, ok2 := strings.Cut(rest, "<!-- end -->")
	if !ok || !ok2 {
		return fmt.Errorf("%s: no table %q", file, name)
	}
	same := strings.Join(strings.SplitN(row, "|", key+2)[:key+1], "|") + "|"
	var out strings.Builder
	put := false
	for line := range strings.Lines(table) {
		if strings.HasPrefix(line, same) {
			line, put = row+"\n", true
		}
		out.WriteString(line)
	}
	if !put {
		out.WriteString(row + "\n")
	}
	return os.WriteFile(file, []byte(head+"<!-- "+name+" -->\n"+out.String()+"<!-- end -->"+tail), 0o644)
}
