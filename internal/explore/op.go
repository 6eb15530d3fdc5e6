package explore

import (
	"math/bits"
	"runtime"
	"time"
	"unsafe"
)

// Kind is how an operation depends on others of the same location.
type Kind uint8

const (
	Read  Kind = iota + 1
	Add        // commutes with other Adds: nobody looks at the result
	Write      // all else
	wait       // a Write that waits until it is ready
	await      // a Read of what the thread has read since its last one, that waits until some of it was written
	kill
	start // of a thread; it depends on nothing
)

// op is an operation that a thread is about to do.
type op struct {
	kind    Kind
	name    string
	pointer unsafe.Pointer
	at      *location
	ready   func() bool // of wait
	last    bool        // of wait: only where no other thread can go on
	watched []watch     // of await
}

// enabled reports whether the operation can be done now.
func (o *op) enabled() bool {
	switch o.kind {
	case wait:
		return o.ready()
	case await:
		for _, w := range o.watched {
			if w.at.writes != w.writes {
				return true
			}
		}
		return len(o.watched) == 0
	}
	return true
}

func (o *op) writes() bool { return o.kind == Add || o.kind == Write || o.kind == wait }

// dependsOn reports whether the order of the two may matter.
func (o *op) dependsOn(p *op) bool {
	switch {
	case o.kind == kill:
		return p.writes() || p.kind == kill
	case p.kind == kill:
		return o.writes()
	case o.kind == await && p.kind == await:
		return false
	case o.kind == await:
		return o.awaits(p)
	case p.kind == await:
		return p.awaits(o)
	case o.at == nil || o.at != p.at:
		return false
	}
	return !(o.kind == Read && p.kind == Read || o.kind == Add && p.kind == Add)
}

func (o *op) awaits(p *op) bool {
	if !p.writes() {
		return false
	}
	for _, w := range o.watched {
		if w.at == p.at {
			return true
		}
	}
	return false
}

// location is what an execution knows of an atomic or a mutex: a hash of the
// operations that the next one of each kind depends on.
type location struct {
	version uint64 // before the group
	group   Kind   // of the last operations, which commute
	sum     uint64 // of their hashes
	writes  int
}

// event adds an operation of a thread with the given hash, and returns its own.
func (l *location) event(thread uint64, kind Kind) uint64 {
	if kind == Write || kind != l.group {
		l.version = mix(l.version^l.sum, uint64(l.group)+1)
		l.group, l.sum = kind, 0
	}
	h := mix(thread^bits.RotateLeft64(l.version, 17), uint64(kind)+11)
	l.sum += h
	return h
}

// perform notes that t does its pending operation.
func (e *execution) perform(t *thread) {
	o := &t.pending
	e.wrote = o.kind == Write || o.kind == Add
	if e.search.tracing {
		e.note(t, o.name)
	}
	id := mix(t.hash, uint64(t.id)+23)
	switch o.kind {
	case Read:
		t.hash = o.at.event(id, Read)
	case Add:
		t.hash = o.at.event(id, Add)
		o.at.writes++
	case Write, wait:
		t.hash = o.at.event(id, Write)
		o.at.writes++
	case await:
		for _, w := range o.watched {
			id = w.at.event(id, Read)
		}
		t.hash = mix(id, 3)
		t.watched = t.watched[:0:0]
	}
	if o.kind == Read || o.kind == Write {
		t.watched = append(t.watched, watch{o.at, o.at.writes})
	}
}

func mix(a, b uint64) uint64 {
	const k0, k1 = 0x9e3779b97f4a7c15, 0xd6e8feb86659fd93
	hi, lo := bits.Mul64(a^k0, b*k1^k1)
	return hi ^ lo ^ a
}

// Do is called by the packages that stand for sync/atomic and sync before each
// operation on what p points to.
func Do(kind Kind, name string, p unsafe.Pointer) {
	if active != nil {
		step(op{kind: kind, name: name, pointer: p})
	}
}

// Then is called with an operation on what p points to that comes with the one before: no
// other thread's step is tried between them. For the release of a mutex none is needed: a
// thread that waits for it cannot go on before, and what others do there they may do earlier.
func Then(kind Kind, name string, p unsafe.Pointer) {
	e, t := running()
	if e == nil {
		return
	}
	t.pending = op{kind: kind, name: name, pointer: p, at: e.location(p)}
	e.perform(t)
	for i, u := range e.run.threads {
		if u != t && u.pending.dependsOn(&t.pending) {
			e.sleep &^= 1 << i
		}
	}
}

// Until is called before an operation on what p points to that waits until it is ready: a
// mutex is free, a channel has something.
func Until(ready func() bool, name string, p unsafe.Pointer) {
	if active != nil {
		step(op{kind: wait, name: name, pointer: p, ready: ready})
	}
}

// Idle is Until for what happens when no other thread can go on: time passes. It needs a
// bound on preemptions.
func Idle(ready func() bool, name string, p unsafe.Pointer) {
	if active != nil {
		step(op{kind: wait, name: name, pointer: p, ready: ready, last: true})
	}
}

// Wait stands for the pauses in a loop that waits: it returns when something was
// written that the loop has read.
func Wait() {
	if active != nil {
		step(op{kind: await, name: "wait"})
	}
}

// Active reports whether a scenario runs.
func Active() bool { return active != nil }

// Step is the number of the last step.
func Step() int { return active.depth }

// Pause stands for time.Sleep and runtime.Gosched. In a scenario it is Wait.
func Pause(d time.Duration) {
	switch {
	case active != nil:
		Wait()
	case d == 0:
		runtime.Gosched()
	default:
		time.Sleep(d)
	}
}
