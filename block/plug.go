package block

// A Kicker has work listed that one system call can carry out.
type Kicker interface {
	// Kick does the listed work without blocking. Kicking with nothing listed
	// is harmless.
	Kick()
}

// Plug collects who must be kicked while a batch of requests passes, so that
// system calls happen once per batch. The zero Plug is ready for use. A Plug
// belongs to one goroutine.
type Plug struct {
	n    int
	list [plugSlots]Kicker
}

const plugSlots = 16

// Add lists k unless it is listed already. When the plug is full, k is kicked
// at once: batching is an optimisation, delivery is not.
func (p *Plug) Add(k Kicker) {
	for _, have := range p.list[:p.n] {
		if have == k {
			return
		}
	}
	if p.n == plugSlots {
		k.Kick()
		return
	}
	p.list[p.n] = k
	p.n++
}

// Flush kicks everything listed, including what kicking lists anew.
func (p *Plug) Flush() {
	for p.n > 0 {
		p.n--
		k := p.list[p.n]
		p.list[p.n] = nil
		k.Kick()
	}
}
