// Package explore runs a test in every order of its atomic steps.
//
// The threads of a scenario are coroutines. Each stops before every operation on an atomic, a
// mutex or a pool (packages explore/atomic and explore/sync, which have the API of sync/atomic
// and sync), and the scheduler decides whose operation comes next. Go's atomics are
// sequentially consistent, so these orders are everything that can happen in a program without
// data races. The search is depth-first, and runs the scenario again from its beginning for
// each order.
//
// Orders that differ only in operations that do not depend on each other lead to the same
// state, and a state is searched only once. Without a bound on preemptions (All), sleep sets
// and the cache of states leave out equivalent orders, and the search is complete. With a bound
// only the cache is used: a sleep set could leave out an order within the bound because of an
// equivalent one beyond it.
//
// A scenario that fails is reported with a trace and its schedule, which Options.Replay runs
// again. Package explore/overlay compiles product files against explore/atomic and
// explore/sync.
package explore

import (
	"errors"
	"fmt"
	"iter"
	"math/bits"
	"os"
	"runtime/debug"
	"strings"
	"testing"
	"time"
	"unsafe"
)

// All is the value of Options.Preemptions for a search without a bound.
const All = -1

const (
	maxThreads = 16

	// A schedule of maxSteps steps counts as a livelock: scenarios have tens of steps.
	maxSteps = 5_000
)

// Options of a search.
type Options struct {
	// Preemptions is how often the scheduler may switch away from a thread that could go on;
	// All: any number of times. To switch away from a thread that waits or has ended costs no
	// preemption.
	Preemptions int
	Replay      string // not empty: the only schedule to run
}

// OptionsFor returns the options that the environment asks for. VERVE_TEST_EXPLORE chooses the
// number of preemptions: ci, deep, or otherwise quick, with which a search takes seconds. If
// VERVE_TEST_REPLAY is set, it is the only schedule to run.
func OptionsFor(quick, ci, deep int) Options {
	o := Options{Preemptions: quick, Replay: os.Getenv("VERVE_TEST_REPLAY")}
	switch os.Getenv("VERVE_TEST_EXPLORE") {
	case "ci":
		o.Preemptions = ci
	case "deep":
		o.Preemptions = deep
	}
	return o
}

// Run is one run of a scenario, with one schedule. The scenario is called for each run, and
// must do the same each time.
type Run struct {
	Killed bool // for the function of Check: the thread of Kill has ended all others

	threads []*thread
	check   func() error
	cleanup func()
}

// Go adds a thread.
func (r *Run) Go(name string, f func()) {
	if len(r.threads) == maxThreads {
		panic("explore: too many threads")
	}
	t := &thread{id: len(r.threads), name: name, run: f}
	t.pending.kind = start
	r.threads = append(r.threads, t)
}

// Kill adds a thread that ends all others, as a kill of the process would: once, at any moment.
func (r *Run) Kill() {
	r.Go("kill", func() { step(op{kind: kill, name: "kill"}) })
}

// Check sets a function that is called when the threads have ended or were killed, and returns
// an error if something does not hold that must.
func (r *Run) Check(f func() error) { r.check = f }

// Cleanup sets a function that is called last, even if the schedule is cut short.
func (r *Run) Cleanup(f func()) { r.cleanup = f }

// Result counts what a search has done.
type Result struct {
	Schedules int // schedules that were run to their end
	Cut       int // schedules that were begun and turned out to be equivalent to an earlier one
	States    int
	Time      time.Duration
}

// Failure is a schedule that fails.
type Failure struct {
	Err      error
	Schedule string // as Options.Replay takes it
	Trace    string // the steps of the schedule
}

func (f *Failure) Error() string {
	return fmt.Sprintf("%v\nschedule %s\n%s", f.Err, f.Schedule, f.Trace)
}

// Explore runs the schedules of a scenario, and fails t at the first schedule that fails.
func Explore(t testing.TB, o Options, scenario func(*Run)) Result {
	t.Helper()
	r, err := Search(o, scenario)
	bound := "any number of preemptions"
	if o.Preemptions != All {
		bound = fmt.Sprintf("%d preemptions", o.Preemptions)
	}
	if err != nil {
		t.Fatalf("failed at schedule %d, with %s: %v", r.Schedules+r.Cut, bound, err)
	}
	t.Logf("explored %s: %d schedules and %d beginnings, %d states, with %s, in %v",
		t.Name(), r.Schedules, r.Cut, r.States, bound, r.Time.Round(time.Millisecond))
	return r
}

// Search does the same as Explore without a test: f is the first failure, or nil.
func Search(o Options, scenario func(*Run)) (r Result, f *Failure) {
	s := &search{options: o, states: map[uint64]uint64{}}
	began := time.Now()
	defer func() { r.States, r.Time = len(s.states), time.Since(began) }()
	if o.Replay != "" {
		r.Schedules = 1
		if err := s.replay(o.Replay, scenario); err != nil {
			return r, &Failure{err, o.Replay, s.story()}
		}
		return r, nil
	}
	for {
		e := s.execute(scenario)
		if e.cut {
			r.Cut++
		} else {
			r.Schedules++
		}
		if e.err != nil {
			schedule := e.schedule()
			again := s.replay(schedule, scenario)
			if again == nil || again.Error() != e.err.Error() {
				e.err = fmt.Errorf("%w\n(a second run of the schedule: %v)", e.err, again)
			}
			return r, &Failure{e.err, schedule, s.story()}
		}
		if !s.backtrack() {
			return r, nil
		}
	}
}

// mask is a set of threads.
type mask = uint16

// node is a decision of the present schedule: which thread does the next step.
type node struct {
	chosen int
	todo   mask // threads still to be chosen here
	done   mask // threads that were chosen here before
	sleep  mask // threads that need not be chosen: an equivalent order was searched
	free   bool // the thread of the step before cannot go on, or offers to wait: another choice costs no preemption
}

// search is a depth-first search.
type search struct {
	options Options
	stack   []node

	// states has the states that were reached. Its values are, with All, the threads that were
	// asleep in that state; otherwise 1 + how many preemptions were left.
	states map[uint64]uint64

	forced  []int // the schedule of replay
	tracing bool
	trace   []string
}

// backtrack moves to the next choice of the last decision that has another one. It returns
// false if none has.
func (s *search) backtrack() bool {
	for len(s.stack) > 0 {
		n := &s.stack[len(s.stack)-1]
		if n.todo != 0 {
			n.done |= 1 << n.chosen
			n.chosen = bits.TrailingZeros16(n.todo)
			n.todo &^= 1 << n.chosen
			return true
		}
		s.stack = s.stack[:len(s.stack)-1]
	}
	return false
}

// replay runs one schedule and traces it.
func (s *search) replay(schedule string, scenario func(*Run)) error {
	forced, err := parseSchedule(schedule)
	if err != nil {
		return err
	}
	s.forced, s.tracing, s.stack = forced, true, nil
	defer func() { s.forced, s.tracing = nil, false }()
	s.trace = nil
	return s.execute(scenario).err
}

// thread is a coroutine of a Run.
type thread struct {
	id   int
	name string
	run  func()

	next    func() (struct{}, bool)
	stop    func()
	yield   func(struct{}) bool
	done    bool
	pending op
	hash    uint64  // of the operations so far, and of those that they depend on
	watched []watch // the locations that the thread has read since it last offered to wait
}

// watch is a location, and how often it was written before it was read.
type watch struct {
	at     *location
	writes int
}

// execution is one run of a scenario.
type execution struct {
	search    *search
	run       *Run
	locations map[unsafe.Pointer]*location
	choices   []byte // threads, in order

	current  int
	depth    int
	used     int  // preemptions
	wrote    bool // the last operation may have changed memory
	sleep    mask
	starting bool
	over     bool // no more choices
	aborting bool // the threads unwind
	cut      bool
	err      error
}

// active is the execution whose thread runs now. Threads run one at a time.
var active *execution

// errAborted is the panic that unwinds threads that have not ended when their schedule is over.
var errAborted = errors.New("explore: the schedule is over")

func (s *search) execute(scenario func(*Run)) *execution {
	if active != nil {
		panic("explore: one search at a time")
	}
	e := &execution{search: s, run: new(Run), locations: map[unsafe.Pointer]*location{}, current: -1}
	scenario(e.run)
	active = e
	e.starting = true
	for _, t := range e.run.threads {
		e.current = t.id
		t.next, t.stop = iter.Pull(e.body(t))
		if _, alive := t.next(); !alive {
			t.done = true
		}
	}
	e.starting, e.current = false, -1
	for on := e.err == nil && e.decide(); on; {
		t := e.run.threads[e.current]
		if _, alive := t.next(); alive {
			on = !e.over
		} else {
			t.done = true
			on = e.err == nil && e.decide()
		}
	}
	e.aborting = true
	for _, t := range e.run.threads {
		t.stop()
	}
	active = nil
	if e.err == nil && !e.cut && e.run.check != nil {
		e.err = e.run.check()
	}
	if e.run.cleanup != nil {
		e.run.cleanup()
	}
	return e
}

// body returns the function that the coroutine of a thread runs.
func (e *execution) body(t *thread) iter.Seq[struct{}] {
	return func(yield func(struct{}) bool) {
		t.yield = yield
		defer func() {
			if p := recover(); p != nil && !e.aborting && e.err == nil {
				e.err = fmt.Errorf("%s: panic: %v\n%s", t.name, p, debug.Stack())
			}
		}()
		t.run()
	}
}

// running returns the execution and the thread that calls it; nil outside of a scenario. If the
// execution is given up, it does not return: it ends the thread.
func running() (*execution, *thread) {
	e := active
	if e == nil {
		return nil, nil
	}
	if e.aborting {
		panic(errAborted)
	}
	return e, e.run.threads[e.current]
}

// step is called by the running thread before each operation. It returns when the scheduler has
// chosen this operation as the next one.
func step(o op) {
	e, t := running()
	if e == nil {
		return
	}
	if o.pointer != nil {
		o.at = e.location(o.pointer)
	}
	if o.kind == await {
		o.watched = t.watched
	}
	t.pending = o
	if e.starting || !e.decide() || e.current != t.id {
		if !t.yield(struct{}{}) || e.aborting {
			panic(errAborted)
		}
	}
	e.perform(t)
	if o.kind == kill {
		e.over = true
		e.run.Killed = true
		t.yield(struct{}{})
		panic(errAborted)
	}
}

// decide chooses the thread whose pending operation is the next one. It returns false if there
// is none, or if everything that can follow was searched before.
func (e *execution) decide() bool {
	s := e.search
	threads := e.run.threads
	var enabled, alive, last mask
	for i, t := range threads {
		if t.done {
			continue
		}
		if t.pending.kind != kill {
			alive |= 1 << i
		}
		switch {
		case !t.pending.enabled():
		case t.pending.last:
			last |= 1 << i
		default:
			enabled |= 1 << i
		}
	}
	if enabled&alive == 0 {
		enabled |= last
	}
	e.over = true
	if alive == 0 {
		return false // a kill now is equivalent to the end
	}
	if enabled&alive == 0 {
		e.err = errors.New("deadlock: " + e.waiting())
		return false
	}
	if e.depth == maxSteps {
		e.err = errors.New("livelock: " + e.waiting())
		return false
	}
	chosen, free, ok := e.choose(enabled)
	if !ok {
		return false
	}
	t := threads[chosen]
	if !free && chosen != e.current && t.pending.kind != kill {
		e.used++
	}
	e.over = false
	e.current = chosen
	e.depth++
	e.choices = append(e.choices, byte(chosen))
	if s.options.Preemptions == All && s.forced == nil {
		n := &s.stack[e.depth-1]
		e.sleep = 0
		for i, u := range threads {
			if (n.sleep|n.done)>>i&1 != 0 && !u.pending.dependsOn(&t.pending) {
				e.sleep |= 1 << i
			}
		}
	}
	return true
}

// choose returns the thread of the next decision: the one on the stack, or a new one, which it
// puts there.
func (e *execution) choose(enabled mask) (chosen int, free, ok bool) {
	s := e.search
	free = e.current < 0 || enabled>>e.current&1 == 0 || e.run.threads[e.current].pending.kind == await
	if s.forced != nil {
		if e.depth == len(s.forced) {
			e.cut = true // the schedule of replay ends here
			return 0, free, false
		}
		chosen = s.forced[e.depth]
		if chosen >= maxThreads || enabled>>chosen&1 == 0 {
			e.err = fmt.Errorf("step %d of the schedule is not possible", e.depth)
			return 0, free, false
		}
		return chosen, free, true
	}
	if e.depth < len(s.stack) {
		n := &s.stack[e.depth]
		if enabled>>n.chosen&1 == 0 {
			panic("explore: the scenario is not the same each time")
		}
		return n.chosen, n.free, true
	}
	todo := enabled &^ e.sleep
	if bound := s.options.Preemptions; bound != All {
		kills := e.kills()
		if e.used == bound && !free {
			todo &= 1<<e.current | kills
		}
		if !e.wrote && e.depth > 0 {
			todo &^= kills // a kill here is equivalent to one before the last operation
		}
	}
	if enabled&(enabled-1) != 0 {
		todo = e.unseen(todo)
	}
	if todo == 0 {
		e.cut = true
		return 0, free, false
	}
	if chosen = e.current; chosen < 0 || todo>>chosen&1 == 0 {
		chosen = bits.TrailingZeros16(todo)
	}
	s.stack = append(s.stack, node{chosen: chosen, todo: todo &^ (1 << chosen), sleep: e.sleep, free: free})
	return chosen, free, true
}

// kills returns the threads of Kill: to switch to one costs no preemption.
func (e *execution) kills() (m mask) {
	for i, t := range e.run.threads {
		if t.pending.kind == kill {
			m |= 1 << i
		}
	}
	return m
}

// unseen returns the threads in todo that were not chosen before in this state.
func (e *execution) unseen(todo mask) mask {
	s := e.search
	if s.options.Preemptions == All {
		key := e.state()
		slept, seen := s.states[key]
		if seen {
			todo &= mask(slept)
			s.states[key] = slept & uint64(e.sleep)
		} else {
			s.states[key] = uint64(e.sleep)
		}
		return todo
	}
	key := mix(e.state(), uint64(e.current+2))
	left := uint64(s.options.Preemptions-e.used) + 1
	if s.states[key] >= left {
		return 0
	}
	s.states[key] = left
	return todo
}

// state returns a hash of what has happened. The order of operations counts only if they depend
// on each other. In two executions with the same state, the same threads are before the same
// operations, and the memory is the same.
func (e *execution) state() uint64 {
	h := uint64(1)
	for _, t := range e.run.threads {
		x := t.hash
		if t.done {
			x = ^x
		}
		h = mix(h^x, uint64(t.id)+7)
	}
	return h
}

func (e *execution) location(p unsafe.Pointer) *location {
	l := e.locations[p]
	if l == nil {
		l = new(location)
		e.locations[p] = l
	}
	return l
}

// waiting returns a text that names the operations for which unfinished threads wait.
func (e *execution) waiting() string {
	var b strings.Builder
	for _, t := range e.run.threads {
		if !t.done && t.pending.kind != kill {
			fmt.Fprintf(&b, "%s before %s; ", t.name, t.pending.name)
		}
	}
	return strings.TrimSuffix(b.String(), "; ")
}
