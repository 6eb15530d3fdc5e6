package stream

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"

	"verve/counter"
	"verve/dedup/redis"
)

// sharedLedger is what the instances of a test share: the rules of the ledger,
// on the test's clock. An epoch is sealed when it is over and all members have
// reported it.
type sharedLedger struct {
	mu      sync.Mutex
	away    bool            // every call fails
	members map[string]bool // alive
	dead    map[string]bool
	leader  string
	epochs  map[counter.Span]*sharedEpoch
	doubts  map[string]time.Time // by member
}

type sharedEpoch struct {
	reported           map[string]counter.Count
	decided            *counter.Count
	written, delivered bool
}

// memberLedger is the view of one member.
type memberLedger struct {
	*sharedLedger
	name string
	past map[counter.Span]bool // that it has reported as delivered; the lock of the ledger guards it
}

var errAway = errors.New("ledger is down")

// groupRound is how often the leader of a group looks for epochs to publish.
const groupRound = time.Second

func newSharedLedger() *sharedLedger {
	return &sharedLedger{members: map[string]bool{}, dead: map[string]bool{}, epochs: map[counter.Span]*sharedEpoch{}, doubts: map[string]time.Time{}}
}

func (l *sharedLedger) join(name string) memberLedger {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.members[l.leader] {
		l.leader = "" // its lease is over
	}
	l.members[name] = true
	delete(l.dead, name)
	return memberLedger{l, name, map[counter.Span]bool{}}
}

// killed is what the others see when a lease ends.
func (l *sharedLedger) killed(name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.members, name)
	l.dead[name] = true
	if l.leader == name {
		l.leader = ""
	}
}

func (l *sharedLedger) isDead(name string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.dead[name]
}

// set changes the ledger under its lock.
func (l *sharedLedger) set(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f()
}

func (l *sharedLedger) epoch(s counter.Span) *sharedEpoch {
	if l.epochs[s] == nil {
		l.epochs[s] = &sharedEpoch{reported: map[string]counter.Count{}}
	}
	return l.epochs[s]
}

// try does f under the lock, if the member reaches the ledger.
func (m memberLedger) try(f func()) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.away || m.dead[m.name] {
		return errAway
	}
	f()
	return nil
}

func (m memberLedger) Report(_ context.Context, c counter.Count) (bool, error) {
	err := m.try(func() { m.epoch(c.Span()).reported[m.name] = c })
	return err == nil, err
}

func (m memberLedger) Seal(ctx context.Context, s counter.Span) (counter.Count, error) {
	for ; ; time.Sleep(time.Millisecond) {
		if ctx.Err() != nil {
			return counter.Count{}, ctx.Err()
		}
		var decided *counter.Count
		err := m.try(func() { decided = m.decide(s) })
		if err != nil {
			return counter.Count{}, err
		}
		if decided != nil {
			return *decided, nil
		}
	}
}

// decide returns what the epoch came to, nil while it may not be sealed. mu is held.
func (m memberLedger) decide(s counter.Span) *counter.Count {
	e := m.epoch(s)
	if e.decided != nil {
		return e.decided
	}
	ready := !s.End().After(time.Now())
	for name := range m.members {
		_, left := e.reported[name]
		ready = ready && left
	}
	if !ready {
		return nil
	}
	c := counter.Count{Start: s.Start, Window: s.Window, Exact: true, SealedAt: s.End()}
	for _, r := range e.reported {
		c.Unique += r.Unique
		c.Complete = c.Complete || r.Complete
	}
	e.decided = &c
	return &c
}

func (m memberLedger) Reconcile(_ context.Context, open bool) (out []counter.Span, err error) {
	err = m.try(func() {
		for s, e := range m.epochs {
			if e.delivered = e.delivered || m.past[s]; !e.delivered && (open || !s.End().After(time.Now())) {
				out = append(out, s)
			}
		}
	})
	slices.SortFunc(out, func(a, b counter.Span) int { return a.Start.Compare(b.Start) })
	return out, err
}

func (m memberLedger) Leading() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.leader == "" && m.members[m.name] {
		m.leader = m.name
	}
	return m.leader == m.name
}

func (m memberLedger) Claim(_ context.Context, _ string, s counter.Span) (claim counter.Claim, err error) {
	err = m.try(func() {
		claim.Unknown = !s.End().After(m.doubts[m.name])
		if e := m.epoch(s); e.written || e.delivered {
			claim.Written = true
			return
		}
		m.leader = cmp.Or(m.leader, m.name)
		claim.Mine = m.leader == m.name
	})
	return claim, err
}

func (m memberLedger) Yield() {} // what fails here fails for all

func (m memberLedger) LinesUnknown(upTo time.Time) { m.set(func() { m.doubts[m.name] = upTo }) }

func (m memberLedger) Written(_ context.Context, _ string, s counter.Span) error {
	return m.try(func() { m.epoch(s).written = true })
}

func (m memberLedger) Delivered(_ context.Context, s counter.Span) error {
	return m.try(func() { m.epoch(s).delivered, m.past[s] = true, true })
}

func (m memberLedger) Leave(context.Context) (n int, heard time.Duration, err error) {
	m.mu.Lock()
	delete(m.members, m.name)
	if m.leader == m.name && len(m.members) > 0 {
		m.leader = ""
	}
	m.mu.Unlock()
	err = m.try(func() { n = len(m.members) })
	return n, 0, err
}

// member is an instance of a group of a test.
type member struct {
	running
	group *redis.Group
}

// in starts an instance of the group that writes to its own file.
func (l *sharedLedger) in(t *testing.T, name, dir string) member { return l.startIn(t, name, dir, "") }

// startIn is in with the directory of a spool.
func (l *sharedLedger) startIn(t *testing.T, name, dir, spool string) member {
	t.Helper()
	ledger := l.join(name)
	r := start(t, spool, Config{Scope: ScopeGroup, Claims: ledger, CountsFile: filepath.Join(dir, name+".jsonl")})
	g, err := redis.NewGroup(ledger, r.Stream, zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = g.Run(ctx) }()
	stop := r.stop
	r.stop = func() { cancel(); <-done; stop() }
	t.Cleanup(r.stop)
	return member{r, g}
}

func (m member) publish(t *testing.T, from, to int) {
	t.Helper()
	for i := from; i < to; i++ {
		if err := m.group.Publish(context.Background(), window(i)); err != nil {
			t.Fatalf("publish window %d: %v", i, err)
		}
	}
}

// lines are those of all counts files in dir.
func lines(t *testing.T, dir string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for l := range bytes.Lines(b) {
			out = append(out, string(bytes.TrimSuffix(l, []byte{'\n'})))
		}
	}
	slices.Sort(out)
	return out
}

// groupLine is the record of the i-th window with the sum of n instances.
func groupLine(t *testing.T, i, n int) string {
	t.Helper()
	w := window(i)
	r := Record{
		WindowStart: w.Start, WindowMS: w.Window.Milliseconds(), Unique: w.Unique * uint64(n),
		Scope: ScopeGroup, Group: "verve", Complete: true, Exact: true, SealedAt: w.Start.Add(w.Window),
	}
	b, err := r.appendJSON(nil)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func wantLines(t *testing.T, got []string, windows, instances int) {
	t.Helper()
	var want []string
	for i := range windows {
		want = append(want, groupLine(t, i, instances))
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %d lines:\n%v\nwant one for each of %d windows:\n%v", len(got), got, windows, want)
	}
}

// inGroupBubble runs a test at a time long after the windows of window.
func inGroupBubble(t *testing.T, f func(t *testing.T)) {
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(time.Until(origin.Add(24 * time.Hour)))
		f(t)
	})
}

// TestGroupWritesOneRecordPerWindow whatever number of instances counted in it;
// its bytes are those that any of them would write.
func TestGroupWritesOneRecordPerWindow(t *testing.T) {
	inGroupBubble(t, func(t *testing.T) {
		dir, l := t.TempDir(), newSharedLedger()
		const instances, windows = 3, 20
		var all []member
		for i := range instances {
			all = append(all, l.in(t, fmt.Sprint("i", i), dir))
		}
		var publishing sync.WaitGroup
		for _, r := range all {
			publishing.Go(func() { r.publish(t, 0, windows) })
		}
		publishing.Wait()
		time.Sleep(2 * groupRound)
		wantLines(t, lines(t, dir), windows, instances)
		for _, r := range all {
			if p := r.Stats().Pending; p != 0 {
				t.Errorf("%d records are pending", p)
			}
			r.stop()
		}
		for s, e := range l.epochs {
			if !e.delivered {
				t.Errorf("%v is not marked as delivered", s)
			}
		}
	})
}

// TestRecordIsPublishedAlthoughItsPublisherIsKilled at every step of the way. Only
// a kill between the write and the ledger's knowing it leaves the line twice, the
// same.
func TestRecordIsPublishedAlthoughItsPublisherIsKilled(t *testing.T) {
	for _, step := range []string{"", stepBefore, stepAppended, stepSynced, stepProduced, stepAcked} {
		t.Run(step, func(t *testing.T) {
			inGroupBubble(t, func(t *testing.T) {
				dir, l := t.TempDir(), newSharedLedger()
				a := l.in(t, "a", dir)
				a.publish(t, 0, 1)
				time.Sleep(2 * groupRound)
				b := l.in(t, "b", dir)
				a.flush(t, time.Minute)
				time.Sleep(2 * groupRound)
				stepHook := func(at string) {
					if at == step {
						l.killed("a")
					}
					if l.isDead("a") {
						runtime.Goexit()
					}
				}
				a.testStep.Store(&stepHook)
				if step == "" {
					l.killed("a") // before it reported
				}
				for _, r := range []member{a, b} {
					go func() { _ = r.group.Publish(t.Context(), window(1)) }()
				}
				time.Sleep(3 * groupRound)
				if !l.isDead("a") {
					t.Fatal("a did not come to the step")
				}
				instances := 2
				if step == "" {
					instances = 1
				}
				got := lines(t, dir)
				if step == stepProduced {
					if len(got) != 3 {
						t.Errorf("got %d lines, want the last one twice", len(got))
					}
					var sums Totals
					for _, l := range got {
						r, err := parseRecord([]byte(l))
						if err != nil {
							t.Fatal(err)
						}
						sums.Add(r)
					}
					if w, ok := sums.Window("verve", window(1).Span()); !ok || w.Unique != 2*window(1).Unique || len(sums.Repeats()) != 1 || !strings.Contains(sums.Repeats()[0], "counted once") {
						t.Errorf("totals: %+v, repeats %v", w, sums.Repeats())
					}
					got = slices.Compact(got)
				}
				if step == stepSynced {
					got = slices.Compact(got) // the sink may have written it just before
				}
				want := []string{groupLine(t, 0, 1), groupLine(t, 1, instances)}
				if !slices.Equal(got, want) {
					t.Errorf("got\n%v\nwant\n%v", got, want)
				}
			})
		})
	}
}

// TestKilledPublisherWritesNothingAgain: its spool has the record that another
// instance has published meanwhile.
func TestKilledPublisherWritesNothingAgain(t *testing.T) {
	inGroupBubble(t, func(t *testing.T) {
		dir, l := t.TempDir(), newSharedLedger()
		spool := t.TempDir()
		sp := testSpool(t, spool)
		ledger := l.join("a")
		s, err := New(Config{Scope: ScopeGroup, Claims: ledger, CountsFile: filepath.Join(dir, "a.jsonl")}, sp)
		if err != nil {
			t.Fatal(err)
		}
		g, err := redis.NewGroup(ledger, s, zerolog.Nop())
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { _ = g.Run(ctx) }) // into the spool, and no further: s does not run
		if err := g.Publish(t.Context(), window(0)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * groupRound)
		stop()
		running.Wait()
		l.killed("a")
		sp.Close()
		b := l.in(t, "b", dir)
		time.Sleep(2 * groupRound)
		wantLines(t, lines(t, dir), 1, 1)
		a := l.startIn(t, "a", dir, spool)
		a.flush(t, time.Minute)
		wantLines(t, lines(t, dir), 1, 1)
		a.stop()
		b.stop()
	})
}

// TestDeliveryIsReportedBeforeTheNextSeal: the leader waits for an instance that has not left the
// next window. The others learn of the record that is delivered meanwhile.
func TestDeliveryIsReportedBeforeTheNextSeal(t *testing.T) {
	inGroupBubble(t, func(t *testing.T) {
		dir, l := t.TempDir(), newSharedLedger()
		b := l.join("b")
		a := l.in(t, "a", dir)
		l.set(func() { l.leader = "a" })
		if _, err := b.Report(t.Context(), window(0)); err != nil {
			t.Fatal(err)
		}
		published := make(chan error, 1)
		go func() { published <- a.group.Publish(context.Background(), window(1)) }()
		synctest.Wait()
		a.publish(t, 0, 1)
		time.Sleep(groupRound / 2)
		l.set(func() {
			if e := l.epoch(window(0).Span()); !e.delivered {
				t.Error("the delivery is not reported")
			}
		})
		if _, err := b.Report(t.Context(), window(1)); err != nil {
			t.Fatal(err)
		}
		if err := <-published; err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * groupRound)
		wantLines(t, lines(t, dir), 2, 2)
		a.stop()
	})
}

// TestSkippedWindowsComeBeforeTheOneAfterThem: after a pause of the process (a suspended machine)
// the ledger has the window that it opened then before it has those that were skipped.
func TestSkippedWindowsComeBeforeTheOneAfterThem(t *testing.T) {
	inGroupBubble(t, func(t *testing.T) {
		dir, l := t.TempDir(), newSharedLedger()
		const windows = 7
		a := l.in(t, "a", dir)
		a.publish(t, 0, 1)
		l.set(func() { l.epoch(window(windows - 1).Span()) })
		time.Sleep(2 * groupRound) // a round that finds it
		a.publish(t, 1, windows)
		time.Sleep(2 * groupRound)
		written, err := os.ReadFile(filepath.Join(dir, "a.jsonl"))
		if err != nil {
			t.Fatal(err)
		}
		wantLines(t, strings.Split(strings.TrimSpace(string(written)), "\n"), windows, 1)
		a.stop()
	})
}

// TestLedgerAwayLosesNoRecord: what was left unsaid is said when it is back.
func TestLedgerAwayLosesNoRecord(t *testing.T) {
	inGroupBubble(t, func(t *testing.T) {
		dir, l := t.TempDir(), newSharedLedger()
		r := l.in(t, "a", dir)
		l.set(func() { l.away = true })
		published := make(chan error, 1)
		go func() {
			for i := range 3 {
				if err := r.group.Publish(context.Background(), window(i)); err != nil {
					published <- err
				}
			}
			close(published)
		}()
		time.Sleep(time.Minute)
		wantLines(t, lines(t, dir), 0, 1)
		l.set(func() { l.away = false })
		if err := <-published; err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * groupRound)
		wantLines(t, lines(t, dir), 3, 1)
		r.stop()
	})
}

// TestLedgerThatForgotGetsNoSecondLine: an instance that does not know of the delivery
// writes the epoch again into a Redis that lost everything.
func TestLedgerThatForgotGetsNoSecondLine(t *testing.T) {
	inGroupBubble(t, func(t *testing.T) {
		dir, l := t.TempDir(), newSharedLedger()
		r := l.in(t, "a", dir)
		r.publish(t, 0, 3)
		time.Sleep(2*groupRound + groupRound/2) // nothing is under way then
		r.stop()
		l.set(func() {
			for _, e := range l.epochs {
				e.written, e.delivered = false, false
			}
		})
		r = l.in(t, "a", dir)                   // the process before knew of the delivery
		time.Sleep(2*groupRound + groupRound/2) // nothing is under way then
		wantLines(t, lines(t, dir), 3, 1)
		l.set(func() {
			for s, e := range l.epochs {
				if !e.delivered {
					t.Errorf("%v is not marked again", s)
				}
			}
		})
		r.stop()
	})
}

// TestLeavingLeavesTheWindowToTheOthers, and the last one publishes it at its end
// if it may wait so long, and else leaves it to the next start.
func TestLeavingLeavesTheWindowToTheOthers(t *testing.T) {
	inGroupBubble(t, func(t *testing.T) {
		dir, l := t.TempDir(), newSharedLedger()
		a, b := l.in(t, "a", dir), l.in(t, "b", dir)
		now := time.Now()
		open := counter.Count{Start: now.Add(-30 * time.Second), Window: time.Minute, Unique: 5, Exact: true}
		leave := func(r member, within time.Duration) {
			t.Helper()
			ctx, cancel := context.WithTimeout(t.Context(), within)
			defer cancel()
			r.group.Leaving()
			if err := r.group.Publish(ctx, open); err != nil { // the counter is sealed
				t.Fatal(err)
			}
			if err := r.group.Leave(ctx); err != nil {
				t.Fatal(err)
			}
			if err := r.Flush(ctx); err != nil {
				t.Fatal(err)
			}
			r.stop()
		}
		leave(a, 10*time.Second)
		if took := time.Since(now); took > time.Second {
			t.Errorf("took %v to leave", took)
		}
		leave(b, 10*time.Second)
		if took := time.Since(now); took > 2*time.Second {
			t.Errorf("took %v to leave, and the window cannot be awaited", took)
		}
		wantLines(t, lines(t, dir), 0, 1)

		c := l.in(t, "c", dir)
		leave(c, time.Minute)
		if took := time.Since(now); took < 30*time.Second || took > 35*time.Second {
			t.Errorf("left after %v, the window was over after 30s", took)
		}
		got := lines(t, dir)
		if len(got) != 1 {
			t.Fatalf("got %d lines", len(got))
		}
		if r, err := parseRecord([]byte(got[0])); err != nil || r.Unique != 15 || r.Complete {
			t.Errorf("got %+v, %v", r, err)
		}
	})
}
