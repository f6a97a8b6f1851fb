package config

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

var update = flag.Bool("update", false, "write the table of docs/configuration.md")

const docs = "../docs/configuration.md"

// The table of options in the documentation is the parser's own.
func TestDocumentedOptionsAreTheParsers(t *testing.T) {
	var b strings.Builder
	b.WriteString("| option | where | default | effect here |\n|---|---|---|---|\n")
	for _, o := range options {
		effect := "honoured"
		if o.idle != "" {
			effect = "accepted: " + o.idle
		}
		std := o.std
		if std == "" {
			std = "-"
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", o.name, strings.Join(strings.Split(o.scopes, ""), " "), std, effect)
	}
	text, err := os.ReadFile(docs)
	require.NoError(t, err)
	head, rest, ok := strings.Cut(string(text), "<!-- options -->\n")
	require.True(t, ok)
	have, tail, ok := strings.Cut(rest, "<!-- end -->")
	require.True(t, ok)
	if *update {
		require.NoError(t, os.WriteFile(docs, []byte(head+"<!-- options -->\n"+b.String()+"<!-- end -->"+tail), 0o644))
		return
	}
	require.Equal(t, b.String(), have, "run go test ./config -update")
}
