package paths

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/scsi"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	fakeBlock  = 512
	fakeBlocks = 64
)

// disk is the logical unit behind all fake sessions.
type disk struct {
	data [fakeBlocks * fakeBlock]byte
	id   byte // last byte of its NAA
}

// fake is a session whose commands end when and how the test says.
type fake struct {
	d       *disk
	door    *door
	depth   int
	onState func(initiator.State, error)
	onRoom  func(*block.Plug)
	done    chan struct{}

	mu      sync.Mutex
	dead    bool
	refused bool
	out     []*initiator.Command // submitted, not ended, in order
	issued  []*initiator.Command // all that were ever taken
}

// door is what a path's Opener meets.
type door struct {
	d      *disk
	mu     sync.Mutex
	closed bool // logins are refused
	depth  int
	logins int
	// knocked counts those that were refused too.
	knocked int
	now     *fake
	ghosts  []ghost      // writes of dead sessions that may still execute
	asked   []byte       // operation codes of control commands
	probe   func() error // what reads of checkers and probes meet; may sleep
}

func (d *door) knocks() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.knocked
}

func (d *door) controls() []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return bytes.Clone(d.asked)
}

type ghost struct {
	lba  uint64
	data []byte
}

// haunt executes one late write; a login before that has ended it.
func (d *door) haunt(i int) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.ghosts) == 0 {
		return false
	}
	g := d.ghosts[i%len(d.ghosts)]
	copy(d.d.data[g.lba*fakeBlock:], g.data)
	return true
}

var errDoor = errors.New("login refused by the test")

func (d *door) open(ctx context.Context, onState func(initiator.State, error), onRoom func(*block.Plug)) (Session, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.knocked++
	if d.closed {
		return nil, errDoor
	}
	d.logins++
	d.ghosts = nil
	d.now = &fake{d: d.d, door: d, depth: d.depth, onState: onState, onRoom: onRoom, done: make(chan struct{})}
	return d.now, nil
}

// session is the one that lives, or nil.
func (d *door) session() *fake {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.now == nil || d.now.isDead() {
		return nil
	}
	return d.now
}

func (d *door) set(closed bool) (before bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	before, d.closed = d.closed, closed
	return before
}

func (f *fake) isDead() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.dead
}

func (f *fake) Submit(c *initiator.Command, _ *block.Plug) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.dead || len(f.out) >= f.depth {
		f.refused = true
		return false
	}
	c.Result = initiator.Result{}
	f.out = append(f.out, c)
	return true
}

func (f *fake) Done() <-chan struct{} { return f.done }

func (f *fake) Close(context.Context) error { f.Abort(errors.New("closed")); <-f.done; return nil }

func (f *fake) Abort(cause error) {
	f.mu.Lock()
	if f.dead {
		f.mu.Unlock()
		return
	}
	f.dead = true
	f.mu.Unlock()
	go func() {
		f.onState(initiator.Dead, cause)
		f.mu.Lock()
		lost := f.out
		f.out = nil
		f.mu.Unlock()
		var p block.Plug
		for _, c := range lost {
			c.Result.Err = initiator.ErrSessionLost
			if c.CDB[0] == 0x93 {
				c.Result.Delivery = initiator.Sent
				n := int(binary.BigEndian.Uint32(c.CDB[10:]))
				f.door.mu.Lock()
				f.door.ghosts = append(f.door.ghosts, ghost{binary.BigEndian.Uint64(c.CDB[2:]), bytes.Repeat(c.Data, n)})
				f.door.mu.Unlock()
			}
			if c.CDB[0] == 0x8a {
				c.Result.Delivery = initiator.Sent
				f.door.mu.Lock()
				f.door.ghosts = append(f.door.ghosts, ghost{binary.BigEndian.Uint64(c.CDB[2:]), bytes.Clone(c.Data)})
				f.door.mu.Unlock()
			}
			c.Owner.Done(c, &p)
		}
		p.Flush()
		close(f.done)
	}()
}

// Do answers control commands at once.
func (f *fake) Do(_ context.Context, c *initiator.Command) error {
	if f.isDead() {
		return initiator.ErrSessionLost
	}
	c.Result = initiator.Result{}
	if f.door != nil {
		f.door.mu.Lock()
		f.door.asked = append(f.door.asked, c.CDB[0])
		f.door.mu.Unlock()
	}
	var b []byte
	if f.door != nil && c.CDB[0] == 0x88 {
		f.door.mu.Lock()
		probe := f.door.probe
		f.door.mu.Unlock()
		if probe != nil {
			if err := probe(); err != nil {
				return err
			}
		}
	}
	switch {
	case c.CDB[0] == 0x12 && c.CDB[1]&1 == 0:
		b = make([]byte, 36)
		b[2], b[4] = 6, 31
		copy(b[8:], "FAKE    DISK            1   ")
	case c.CDB[0] == 0x12 && c.CDB[2] == 0:
		b = []byte{0, 0, 0, 2, 0, 0x83}
	case c.CDB[0] == 0x12:
		b = append([]byte{0, 0x83, 0, 20, 1, 3, 0, 16, 0x60}, make([]byte, 15)...)
		b[23] = f.d.id
	case c.CDB[0] == 0x9e:
		b = make([]byte, 32)
		binary.BigEndian.PutUint64(b, fakeBlocks-1)
		binary.BigEndian.PutUint32(b[8:], fakeBlock)
	case c.CDB[0] == 0x1a: // unknown here: the cache counts as volatile
		c.Result.Status = scsi.StatusCheckCondition
		c.Result.SenseLen = uint8(copy(c.Result.Sense[:], sense(5, 0x20, 0)))
	}
	c.Result.Received = uint32(copy(c.Data, b))
	return nil
}

func sense(key, asc, ascq byte) []byte {
	return []byte{0x70, 0, key, 0, 0, 0, 0, 10, 0, 0, 0, 0, asc, ascq, 0, 0, 0, 0}
}

// pending are the commands that have not ended.
func (f *fake) pending() []*initiator.Command {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.out)
}

// end takes command i off the session with an outcome: "good", "busy",
// "ua", "retry", "medium" or "fail".
func (f *fake) end(i int, outcome string) {
	f.mu.Lock()
	c := f.out[i]
	f.out = slices.Delete(f.out, i, i+1)
	room := f.refused
	f.refused = false
	f.mu.Unlock()
	r := &c.Result
	fail := func(key, asc, ascq byte) {
		r.Status = scsi.StatusCheckCondition
		r.SenseLen = uint8(copy(r.Sense[:], sense(key, asc, ascq)))
	}
	switch outcome {
	case "good":
		f.execute(c)
	case "busy":
		r.Status = scsi.StatusBusy
	case "ua":
		fail(6, 0x29, 0)
	case "retry":
		fail(2, 4, 1)
	case "medium":
		fail(3, 0x11, 0)
	case "fail":
		r.Err = initiator.ErrTargetFailure
	}
	var p block.Plug
	c.Owner.Done(c, &p)
	if room {
		f.onRoom(&p)
	}
	p.Flush()
}

func (f *fake) execute(c *initiator.Command) {
	lba := binary.BigEndian.Uint64(c.CDB[2:])
	switch c.CDB[0] {
	case 0x88:
		copy(c.Data, f.d.data[lba*fakeBlock:])
	case 0x8a:
		copy(f.d.data[lba*fakeBlock:], c.Data)
	case 0x93: // WRITE SAME(16)
		n := uint64(binary.BigEndian.Uint32(c.CDB[10:]))
		for i := range n {
			copy(f.d.data[(lba+i)*fakeBlock:], c.Data)
		}
	}
}

// done collects completions; a request that comes twice is a failure.
type done struct {
	mu sync.Mutex
	n  map[*block.Request]int
	in []*block.Request
}

func (d *done) Complete(r *block.Request, _ *block.Plug) {
	d.mu.Lock()
	d.n[r]++
	d.in = append(d.in, r)
	d.mu.Unlock()
}

func (d *done) count(r *block.Request) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.n[r]
}

func newGroup(t testing.TB, c Config, n, depth int) (*Group, []*door, *disk) {
	d := &disk{id: 1}
	doors := make([]*door, n)
	c.Alias, c.Checker = "m", "none"
	if c.QueueDepth == 0 {
		c.QueueDepth = 16
	}
	first, err := initiator.Identify(context.Background(), &fake{d: d}, [8]byte{})
	require.NoError(t, err)
	g, err := NewGroup(c, first)
	require.NoError(t, err)
	for i := range doors {
		doors[i] = &door{d: d, depth: depth}
		_, err := g.AddPath(PathConfig{Name: string(rune('A' + i)), Target: "iqn.t", Order: i, Open: doors[i].open}, first)
		require.NoError(t, err)
	}
	return g, doors, d
}

func closeGroup(g *Group) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	g.Close(ctx)
}
