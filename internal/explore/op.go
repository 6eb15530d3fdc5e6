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
	Add        // commutes with other Adds: its result is not used
	Write      // all else
	wait       // a Write that waits until it is ready
	await      // a Read of everything that the thread has read since its last await; it waits until some of that is written
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
	last    bool        // of wait: only if no other thread can go on
	watched []watch     // of await
}

// enabled reports whether the operation can be done now, without waiting.
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

// dependsOn reports whether the order of the two operations may matter.
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

// location is the history of an atomic or a mutex in an execution: hashes of the operations on
// which the next operation of each kind depends.
type location struct {
	version uint64 // hash of the operations before the group
	group   Kind   // kind of the last operations, which commute
	sum     uint64 // sum of the hashes of these
	writes  int
}

// event adds an operation of a thread with the given hash, and returns the hash of the
// operation.
func (l *location) event(thread uint64, kind Kind) uint64 {
	if kind == Write || kind != l.group {
		l.version = mix(l.version^l.sum, uint64(l.group)+1)
		l.group, l.sum = kind, 0
	}
	h := mix(thread^bits.RotateLeft64(l.version, 17), uint64(kind)+11)
	l.sum += h
	return h
}

// perform records that t does its pending operation.
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

// Do is called by the packages that replace sync/atomic and sync, before each operation on the
// memory that p points to.
func Do(kind Kind, name string, p unsafe.Pointer) {
	if active != nil {
		step(op{kind: kind, name: name, pointer: p})
	}
}

// Then records an operation on the memory that p points to as one step with the operation
// before it: no step of another thread is tried between the two. It is used for the release of
// a mutex: a thread that waits for the mutex cannot go on before the release, and what other
// threads do between the two they may do earlier.
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

// Until is called before an operation on the memory that p points to that has to wait until it
// is ready, for example until a mutex is free or a channel has a value.
func Until(ready func() bool, name string, p unsafe.Pointer) {
	if active != nil {
		step(op{kind: wait, name: name, pointer: p, ready: ready})
	}
}

// Idle is like Until, for an operation that is done only if no other thread can go on: time
// passes. It needs a bound on preemptions.
func Idle(ready func() bool, name string, p unsafe.Pointer) {
	if active != nil {
		step(op{kind: wait, name: name, pointer: p, ready: ready, last: true})
	}
}

// Wait replaces the pauses in a loop that waits: it returns when something is written that the
// loop has read.
func Wait() {
	if active != nil {
		step(op{kind: await, name: "wait"})
	}
}

// Active reports whether a scenario is running.
func Active() bool { return active != nil }

// Step returns the number of the last step.
func Step() int { return active.depth }

// Pause replaces time.Sleep and runtime.Gosched. In a scenario it does the same as Wait.
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
