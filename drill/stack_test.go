package drill

import (
	"bytes"
	"context"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m)
}

// TestDemoLosesNothing runs the whole stack through its three faults.
func TestDemoLosesNothing(t *testing.T) {
	var out bytes.Buffer
	err := Demo(context.Background(), &out)
	t.Log("\n" + out.String())
	require.NoError(t, err)
	require.Contains(t, out.String(), "nothing was lost")
}
