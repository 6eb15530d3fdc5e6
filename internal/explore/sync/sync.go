// Package sync has the API of sync that the product uses. While a scenario of package explore
// runs, each operation is a step of its schedule; otherwise it is the operation of sync. A
// WaitGroup starts goroutines, which scenarios do not do, so it is always that of sync.
package sync

import (
	real "sync"
	"unsafe"

	"verve/internal/explore"
)

// WaitGroup is a sync.WaitGroup.
type WaitGroup = real.WaitGroup

// OnceValue is sync.OnceValue.
func OnceValue[T any](f func() T) func() T { return real.OnceValue(f) }

// Mutex is a sync.Mutex.
type Mutex struct {
	m    real.Mutex
	held bool // guarded by m, except when the scheduler reads it
}

func (m *Mutex) Lock() {
	explore.Until(func() bool { return !m.held }, "lock", unsafe.Pointer(&m.held))
	m.m.Lock()
	m.held = true
}

func (m *Mutex) TryLock() bool {
	explore.Do(explore.Write, "try lock", unsafe.Pointer(&m.held))
	ok := m.m.TryLock()
	if ok {
		m.held = true
	}
	return ok
}

func (m *Mutex) Unlock() {
	explore.Then(explore.Write, "unlock", unsafe.Pointer(&m.held))
	m.held = false
	m.m.Unlock()
}

// Locker is a sync.Locker.
type Locker = real.Locker

// Once is a sync.Once.
type Once struct {
	m    Mutex
	done bool
}

func (o *Once) Do(f func()) {
	o.m.Lock()
	defer o.m.Unlock()
	if !o.done {
		defer func() { o.done = true }()
		f()
	}
}

// Pool is a sync.Pool that returns the value that was put in last, and drops none.
type Pool struct {
	New   func() any
	m     real.Mutex
	items []any
}

func (p *Pool) Get() any {
	explore.Do(explore.Write, "get", unsafe.Pointer(p))
	p.m.Lock()
	defer p.m.Unlock()
	if n := len(p.items); n > 0 {
		x := p.items[n-1]
		p.items = p.items[:n-1]
		return x
	}
	if p.New == nil {
		return nil
	}
	return p.New()
}

func (p *Pool) Put(x any) {
	explore.Do(explore.Write, "put", unsafe.Pointer(p))
	p.m.Lock()
	defer p.m.Unlock()
	p.items = append(p.items, x)
}

// Cond is a sync.Cond. Signal wakes the thread that has waited longest, as the runtime does.
type Cond struct {
	L        Locker
	asleep   []*bool // one for each waiting thread, in the order in which they began to wait
	fallback real.Cond
}

// NewCond returns a Cond with the Locker l.
func NewCond(l Locker) *Cond { return &Cond{L: l} }

func (c *Cond) Wait() {
	if !explore.Active() {
		c.fallback.L = c.L
		c.fallback.Wait()
		return
	}
	explore.Do(explore.Write, "wait for signal", unsafe.Pointer(c))
	asleep := true
	c.asleep = append(c.asleep, &asleep)
	c.L.Unlock()
	explore.Until(func() bool { return !asleep }, "wake", unsafe.Pointer(c))
	c.L.Lock()
}

func (c *Cond) Signal() {
	explore.Do(explore.Write, "signal", unsafe.Pointer(c))
	c.wake(1)
	c.fallback.Signal()
}

func (c *Cond) Broadcast() {
	explore.Do(explore.Write, "broadcast", unsafe.Pointer(c))
	c.wake(len(c.asleep))
	c.fallback.Broadcast()
}

func (c *Cond) wake(n int) {
	for ; n > 0 && len(c.asleep) > 0; n-- {
		*c.asleep[0] = false
		c.asleep = c.asleep[1:]
	}
}
