package block

import (
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestBuffersNeverOverlapAndAllRoomComesBack(t *testing.T) {
	for seed := range uint64(20) {
		a := NewArena(9<<20 + 12<<10)
		require.NoError(t, a.Populate())
		r := rand.New(rand.NewPCG(seed, 0))
		held := map[byte][]byte{}
		for range 3000 {
			mark := byte(r.IntN(255) + 1)
			if b := held[mark]; b != nil {
				for _, v := range b {
					if v != mark {
						t.Fatalf("seed %d: somebody else wrote into a buffer", seed)
					}
				}
				delete(held, mark)
				a.Put(b)
				continue
			}
			if b := a.TryGet(r.IntN(1<<r.IntN(24)) + 1); b != nil {
				for i := range b {
					b[i] = mark
				}
				held[mark] = b
			}
		}
		for _, b := range held {
			a.Put(b)
		}
		require.Zero(t, a.out)
		// Nothing is lost to fragments: the largest block is there, and the small ones.
		b := a.TryGet(8 << 20)
		require.NotNil(t, b)
		c := a.TryGet(1 << 20)
		require.NotNil(t, c)
		require.NotNil(t, a.TryGet(8<<10))
		require.NotNil(t, a.TryGet(1))
		require.Nil(t, a.TryGet(1))
		a.Close()
	}
}

func TestWhoWaitsIsServedInOrder(t *testing.T) {
	a := NewArena(1 << 20)
	var small [][]byte
	for range 256 {
		small = append(small, a.Get(4096))
	}
	got := make(chan int, 300)
	var wg sync.WaitGroup
	wg.Add(1)
	go func() { defer wg.Done(); b := a.Get(1 << 20); got <- 0; a.Put(b) }()
	waits := func(n uint64) {
		require.Eventually(t, func() bool { a.mu.Lock(); defer a.mu.Unlock(); return a.next-a.turn == n }, 5*time.Second, time.Millisecond)
	}
	waits(1)
	a.Put(small[255])
	small = small[:255]
	require.Nil(t, a.TryGet(4096), "a late small one overtakes")
	wg.Add(1)
	go func() { defer wg.Done(); b := a.Get(4096); got <- 1; a.Put(b) }()
	waits(2)
	for _, b := range small {
		a.Put(b)
	}
	require.Equal(t, 0, <-got)
	require.Equal(t, 1, <-got)
	wg.Wait()
}

func TestABufferLargerThanTheBudgetHasMemoryOfItsOwnOneAtATime(t *testing.T) {
	a := NewArena(1 << 20)
	all := a.Get(1 << 20)
	b := a.Get(MaxBuffer)
	require.Len(t, b, MaxBuffer)
	require.Nil(t, a.TryGet(2<<20))
	a.Put(b)
	c := a.TryGet(2 << 20)
	require.Len(t, c, 2<<20)
	a.Put(c)
	a.Put(all)
}

func TestCloseEndsAllWaiting(t *testing.T) {
	a := NewArena(1 << 20)
	starved := make(chan struct{}, 100)
	a.Starved = func() { starved <- struct{}{} }
	b := a.Get(1 << 20)
	end := make(chan []byte)
	for range 3 {
		go func() { end <- a.Get(4096) }()
	}
	<-starved
	a.Close()
	for range 3 {
		require.Nil(t, <-end)
	}
	a.Put(b)
	require.Nil(t, a.Get(1))
}

func TestAnArenaInUseAllocatesNothing(t *testing.T) {
	a := NewArena(1 << 20)
	require.Zero(t, testing.AllocsPerRun(1000, func() {
		b, c := a.Get(4096), a.Get(64<<10)
		a.Put(b)
		a.Put(c)
	}))
}
