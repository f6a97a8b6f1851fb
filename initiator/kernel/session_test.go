package kernel

import (
	"context"
	"encoding/binary"
	"errors"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/internal/sys"
	"github.com/mpathd/mpathd/scsi"
)

const bs = 512

// fake is a device in memory whose calls hang, fail or answer as told.
type fake struct {
	mu     sync.Mutex
	disk   []byte
	size   int64         // as the kernel knows it; 0: all of disk
	hang   chan struct{} // READ and WRITE wait for it to close, if set
	mute   chan struct{} // SG_IO too
	errno  error         // of READ and WRITE
	host   uint16        // of SG_IO
	short  int           // bytes at the end that SG_IO leaves out of data, with GOOD status
	answer []byte        // sense that SG_IO answers next
	sgs    []scsi.CDB
	resets int
	scans  int
	closed bool
}

func newFake(blocks int) *fake { return &fake{disk: make([]byte, blocks*bs)} }

func wait(c chan struct{}) {
	if c != nil {
		<-c
	}
}

func (f *fake) set(change func()) { f.mu.Lock(); change(); f.mu.Unlock() }

func (f *fake) io(b []byte, off int64, write bool) (int, error) {
	f.mu.Lock()
	hang := f.hang
	f.mu.Unlock()
	wait(hang)
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.errno != nil {
		return 0, f.errno
	}
	disk := f.disk
	if f.size > 0 {
		disk = disk[:f.size]
	}
	if off >= int64(len(disk)) {
		if write {
			return 0, syscall.ENOSPC
		}
		return 0, nil
	}
	if write {
		return copy(disk[off:], b), nil
	}
	return copy(b, disk[off:]), nil
}

func (f *fake) readAt(b []byte, off int64) (int, error)          { return f.io(b, off, false) }
func (f *fake) writeAt(b []byte, off int64, _ bool) (int, error) { return f.io(b, off, true) }
func (f *fake) reset() error                                     { f.set(func() { f.resets++ }); return nil }
func (f *fake) rescan()                                          { f.set(func() { f.scans++; f.size = 0 }) }
func (f *fake) close()                                           { f.set(func() { f.closed = true }) }

func (f *fake) sg(r *sys.SGRequest) error {
	f.mu.Lock()
	mute := f.mute
	f.mu.Unlock()
	wait(mute)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sgs = append(f.sgs, r.CDB)
	switch {
	case f.host != 0:
		r.Host = f.host
	case f.answer != nil:
		r.Status, r.SenseLen = scsi.StatusCheckCondition, copy(r.Sense[:], f.answer)
		f.answer = nil
	case isData(r.CDB[0]):
		lba, _, _ := extent(&r.CDB)
		n := len(r.Data) - f.short
		if r.Residual = f.short; r.Direction == sys.SGOut {
			copy(f.disk[lba*bs:], r.Data[:n])
		} else {
			copy(r.Data[:n], f.disk[lba*bs:])
		}
	case r.CDB[0] == scsi.OpReadCapacity10:
		binary.BigEndian.PutUint32(r.Data, uint32(len(f.disk)/bs-1))
		binary.BigEndian.PutUint32(r.Data[4:], bs)
	}
	return nil
}

// begin starts a session and notes its states.
func begin(f *fake, o Options) (*Session, func() []initiator.State) {
	var mu sync.Mutex
	var states []initiator.State
	o.OnState = func(st initiator.State, _ error) { mu.Lock(); states = append(states, st); mu.Unlock() }
	s := newSession(o, f, "/dev/fake", bs)
	s.start()
	return s, func() []initiator.State {
		mu.Lock()
		defer mu.Unlock()
		return append([]initiator.State(nil), states...)
	}
}

func rw(write bool, lba uint64, data []byte) *initiator.Command {
	c := &initiator.Command{Data: data}
	if write {
		c.Dir = initiator.DataOut
		scsi.Write(&c.CDB, lba, uint32(len(data)/bs), false, false)
	} else {
		c.Dir = initiator.DataIn
		scsi.Read(&c.CDB, lba, uint32(len(data)/bs), false)
	}
	return c
}

func senseBytes(key, asc, ascq uint8) []byte { r := sense(key, asc, ascq); return r.SenseData() }

func filled(n int, v byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = v
	}
	return b
}

// order collects commands as they come back; twice is an error.
type order struct {
	mu   sync.Mutex
	tags []uint64
}

func (o *order) Done(c *initiator.Command, _ *block.Plug) {
	o.mu.Lock()
	o.tags = append(o.tags, c.Tag)
	o.mu.Unlock()
}

func (o *order) seen() []uint64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return append([]uint64(nil), o.tags...)
}

func TestReadsSeeWhatWasWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(1024)
		s, _ := begin(f, Options{})
		ctx := context.Background()
		for i, n := range []int{1, 8, 100} { // blocks
			w := rw(true, uint64(i*200), filled(n*bs, byte(i+1)))
			require.NoError(t, s.Do(ctx, w))
			r := rw(false, uint64(i*200), make([]byte, n*bs))
			require.NoError(t, s.Do(ctx, r))
			require.Equal(t, w.Data, r.Data)
			require.EqualValues(t, n*bs, r.Result.Received)
		}
		require.Empty(t, f.sgs, "data does not go through SG_IO")
		require.NoError(t, s.Close(ctx))
		require.True(t, f.closed)
	})
}

// The unit ends a command with GOOD status and less data than it was asked for:
// what the buffer held before is not the disk's.
func TestShortAnswersAreNoData(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(1024)
		s, _ := begin(f, Options{})
		ctx := context.Background()
		require.NoError(t, s.Do(ctx, rw(true, 0, filled(8*bs, 0xee)))) // what is left in the buffer
		f.set(func() { f.errno, f.short = syscall.EIO, bs })
		r := rw(false, 100, make([]byte, 8*bs))
		require.ErrorIs(t, s.Do(ctx, r), initiator.ErrShort)
		require.NotContains(t, r.Data, byte(0xee))
		// A write beyond the end that the kernel knows goes to the unit at once.
		f.set(func() { f.errno, f.size = nil, 8*bs })
		require.ErrorIs(t, s.Do(ctx, rw(true, 100, filled(8*bs, 1))), initiator.ErrShort)
		require.NoError(t, s.Close(ctx))
	})
}

func TestHungWritesComeBackAtOnceAndTheKernelKeepsItsOwnBytes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(4096)
		f.hang, f.mute = make(chan struct{}), make(chan struct{})
		s, states := begin(f, Options{FailoverTime: time.Second})
		var o order
		var cs []*initiator.Command
		for i := range maxWorkers + 8 {
			c := rw(true, uint64(i), filled(bs, 0xaa))
			if i == 3 {
				c = rw(false, 2000, filled(bs, 0xbb))
			}
			c.Owner, c.Tag = &o, uint64(i)
			cs = append(cs, c)
			require.True(t, s.Submit(c, nil))
		}
		began := time.Now()
		<-s.Done()
		require.Equal(t, time.Second, time.Since(began))
		require.Equal(t, []initiator.State{initiator.Suspect, initiator.Dead}, states())
		require.False(t, s.Submit(rw(false, 0, make([]byte, bs)), nil))
		for i, tag := range o.seen() {
			require.EqualValues(t, i, tag, "handed back in the order of submission")
		}
		require.Len(t, o.seen(), len(cs))
		for i, c := range cs {
			require.Equal(t, initiator.ErrSessionLost, c.Result.Err)
			want := initiator.Sent
			if i >= maxWorkers {
				want = initiator.NotSent
			}
			require.Equal(t, want, c.Result.Delivery, "command %d", i)
			copy(c.Data, filled(bs, 0xcc)) // the owner uses its memory again
		}
		select {
		case <-s.released:
			t.Fatal("released while the kernel holds I/O")
		default:
		}
		require.False(t, f.closed)
		close(f.hang)
		close(f.mute)
		<-s.released
		require.True(t, f.closed)
		require.Equal(t, byte(0xaa), f.disk[0], "the late write carries the bytes of its time")
		require.Equal(t, byte(0xcc), cs[3].Data[0], "the late read touches nothing")
		require.Len(t, o.seen(), len(cs), "each came back once")
	})
}

func TestASlowUnitThatAnswersPingsIsNotDead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(16)
		f.hang = make(chan struct{})
		s, states := begin(f, Options{FailoverTime: time.Second})
		var o order
		c := rw(false, 0, make([]byte, bs))
		c.Owner = &o
		require.True(t, s.Submit(c, nil))
		time.Sleep(20 * time.Second)
		require.Empty(t, states())
		close(f.hang)
		synctest.Wait()
		require.NoError(t, c.Result.Err)
		require.NoError(t, s.Close(context.Background()))
	})
}

func TestACommandThatHangsForGoodEndsTheSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(16)
		f.hang = make(chan struct{})
		s, _ := begin(f, Options{FailoverTime: time.Second, CommandTimeout: 5 * time.Second})
		var o order
		c := rw(false, 0, make([]byte, bs))
		c.Owner = &o
		require.True(t, s.Submit(c, nil))
		<-s.Done()
		require.ErrorIs(t, s.Err(), initiator.ErrTimeout)
		close(f.hang)
		<-s.released
	})
}

func TestAnIdleSessionNoticesThatItsDeviceFailed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(16)
		s, _ := begin(f, Options{FailoverTime: time.Second})
		time.Sleep(3 * time.Second)
		require.NoError(t, s.Err())
		f.set(func() { f.host = 0x01 })
		began := time.Now()
		<-s.Done()
		require.LessOrEqual(t, time.Since(began), 2*time.Second)
		require.ErrorContains(t, s.Err(), "no connection")
		<-s.released
	})
}

func TestTheUnitsOwnErrorIsSeenBehindAnErrno(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(16)
		f.errno = syscall.EIO
		f.answer = senseBytes(scsi.KeyMedium, 0x11, 0)
		s, states := begin(f, Options{})
		c := rw(false, 3, make([]byte, bs))
		require.NoError(t, s.Do(context.Background(), c))
		require.Equal(t, scsi.StatusCheckCondition, c.Result.Status)
		require.Equal(t, scsi.KeyMedium, scsi.ParseSense(c.Result.SenseData()).Key)
		require.Empty(t, states())
		require.NoError(t, s.Close(context.Background()))
	})
}

func TestAWriteThatFailedOnTheWayIsAmbiguousEvenIfItsRepetitionSucceeds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(16)
		f.errno = syscall.EIO
		s, _ := begin(f, Options{})
		read := rw(false, 3, make([]byte, bs))
		require.NoError(t, s.Do(context.Background(), read), "a read has no late copy")
		c := rw(true, 3, filled(bs, 1))
		require.ErrorIs(t, s.Do(context.Background(), c), initiator.ErrSessionLost)
		require.Equal(t, initiator.Sent, c.Result.Delivery)
		<-s.released
	})
}

func TestADeviceThatIsGoneEndsTheSession(t *testing.T) {
	for _, errno := range []error{syscall.ENODEV, syscall.ENXIO} {
		synctest.Test(t, func(t *testing.T) {
			f := newFake(16)
			f.errno = errno
			s, _ := begin(f, Options{})
			require.ErrorIs(t, s.Do(context.Background(), rw(false, 3, make([]byte, bs))), initiator.ErrSessionLost)
			<-s.released
		})
	}
}

func TestAUnitThatGrewServesBeyondTheKernelsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(64)
		f.size = 32 * bs
		s, _ := begin(f, Options{})
		w := rw(true, 40, filled(bs, 7))
		require.NoError(t, s.Do(context.Background(), w))
		require.Equal(t, byte(7), f.disk[40*bs])
		require.Equal(t, 1, f.scans)
		require.NoError(t, s.Close(context.Background()))
	})
}

func TestAnAttentionThatAPingDrewIsToldToTheNextCommand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(16)
		s, _ := begin(f, Options{FailoverTime: time.Second})
		heard := make(chan initiator.Notice, 8)
		s.OnNotice(func(n initiator.Notice) { heard <- n })
		f.set(func() { f.answer = senseBytes(scsi.KeyUnitAttention, 0x29, 0) })
		time.Sleep(1500 * time.Millisecond) // an idle ping takes it
		require.Equal(t, uint8(0x29), (<-heard).Sense.ASC)
		c := rw(true, 0, filled(bs, 1))
		require.NoError(t, s.Do(context.Background(), c))
		require.Equal(t, scsi.Sense{Key: scsi.KeyUnitAttention, ASC: 0x29, Valid: true}, scsi.ParseSense(c.Result.SenseData()))
		require.Zero(t, f.disk[0], "such a command was not executed")
		require.NoError(t, s.Do(context.Background(), c))
		require.Equal(t, scsi.StatusGood, c.Result.Status)
		require.NoError(t, s.Close(context.Background()))
	})
}

func TestRefusedCommandsHearOfRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(16)
		f.hang = make(chan struct{})
		room := make(chan struct{}, 8)
		s, _ := begin(f, Options{QueueDepth: 2, OnRoom: func(*block.Plug) { room <- struct{}{} }})
		var o order
		for range 2 {
			c := rw(false, 0, make([]byte, bs))
			c.Owner = &o
			require.True(t, s.Submit(c, nil))
		}
		require.False(t, s.Submit(rw(false, 0, make([]byte, bs)), nil))
		close(f.hang)
		<-room
		require.NoError(t, s.Close(context.Background()))
		require.Len(t, o.seen(), 2)
	})
}

func TestTheNextSessionWaitsForWhatTheKernelStillHolds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(16)
		f.hang = make(chan struct{})
		s, _ := begin(f, Options{})
		var l sessions
		l.add(s)
		var o order
		c := rw(true, 0, filled(bs, 1))
		c.Owner = &o
		require.True(t, s.Submit(c, nil))
		synctest.Wait()
		s.Abort(errors.New("cut"))
		<-s.Done()
		require.ErrorContains(t, l.drain(context.Background()), "still hang in the kernel")
		close(f.hang)
		require.NoError(t, l.drain(context.Background()))
		require.Empty(t, func() []*Session { l.drain(context.Background()); return l.list }())
	})
}

func TestAUnitResetThatIsNotSupportedProvesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(16)
		s, _ := begin(f, Options{})
		require.NoError(t, s.LUReset(context.Background(), [8]byte{}))
		require.Equal(t, 1, f.resets)
		s.Abort(errClosed)
		<-s.released
		require.ErrorIs(t, s.LUReset(context.Background(), [8]byte{}), initiator.ErrSessionLost)
	})
}
