package redis

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/rueidis"
	"github.com/rs/zerolog"

	"verve/counter"
	"verve/internal/testproc"
)

// group is a Redis of its own with the members that a test makes.
type group struct {
	t       *testing.T
	client  rueidis.Client
	counted atomic.Uint64 // what sealing an epoch comes to
	answers atomic.Uint64 // what each member reports
	seals   atomic.Int64  // how often one was sealed
}

func newGroup(t *testing.T) *group {
	t.Helper()
	exe := testproc.Needs(t, "redis-server", "redis")
	// On a socket, which needs no free port.
	dir, err := os.MkdirTemp("", "verve-redis-") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	socket := dir + "/s"
	cmd := exec.Command(exe, "--port", "0", "--unixsocket", socket, "--save", "", "--dir", dir)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		_ = os.RemoveAll(dir)
	})
	g := &group{t: t}
	testproc.Until(t, "redis-server answers", func() bool {
		g.client, err = rueidis.NewClient(rueidis.ClientOption{
			InitAddress: []string{socket}, DisableCache: true, ForceSingleClient: true,
			DialCtxFn: func(ctx context.Context, _ string, d *net.Dialer, _ *tls.Config) (net.Conn, error) {
				return d.DialContext(ctx, "unix", socket)
			},
		})
		return err == nil
	})
	t.Cleanup(g.client.Close)
	return g
}

// fakeIDs are the ids of a member of a test's group.
type fakeIDs struct {
	*group
	sealed func() sealedIDs         // nil: what the group has counted
	oldest func() (time.Time, bool) // unsettled; nil: none
	keys   func() counter.KeyCounts // of a sealed epoch; nil: none
	fails  error                    // of sealing
	form   error                    // of formAgrees
	gone   string                   // a session that no lane has
}

func (f *fakeIDs) conn() (rueidis.Client, error)                 { return f.client, nil }
func (f *fakeIDs) noticeLosses(context.Context, time.Time) error { return nil }

func (f *fakeIDs) formAgrees() error { return f.form }

func (f *fakeIDs) keyCounts(context.Context, counter.Span) (keys counter.KeyCounts, err error) {
	if f.keys != nil {
		keys = f.keys()
	}
	return keys, nil
}

func (f *fakeIDs) dropKeys(context.Context, counter.Span) error { return nil }

func (f *fakeIDs) sealIDs(_ context.Context, _ counter.Span, sessions []string) (sealedIDs, error) {
	f.seals.Add(1)
	if f.fails != nil {
		return sealedIDs{}, f.fails
	}
	if f.sealed != nil {
		return f.sealed(), nil
	}
	return sealedIDs{
		unique: f.counted.Load(), exact: true,
		whole: f.gone == "" || !slices.ContainsFunc(sessions, func(s string) bool { return s[1:] == f.gone }),
	}, nil
}

func (f *fakeIDs) unsettled() (oldest, newest time.Time, some bool) {
	if f.oldest != nil {
		oldest, some = f.oldest()
	}
	return oldest, oldest, some
}

func (g *group) member(name string, change ...func(*Config, *fakeIDs)) *Ledger {
	ids := &fakeIDs{group: g}
	cfg := Config{Group: "a {b}", Instance: name, Window: time.Minute, MaxSkew: time.Second}
	for _, f := range change {
		f(&cfg, ids)
	}
	return openLedger(cfg, name, ids)
}

// span is a minute that ended so long ago; negative: it is to come.
func spanEnded(ago time.Duration) counter.Span {
	return counter.Span{Start: time.Now().Add(-ago - time.Minute).Truncate(time.Millisecond).UTC(), Window: time.Minute}
}

func (g *group) do(f func(context.Context) error) {
	g.t.Helper()
	if err := f(g.t.Context()); err != nil {
		g.t.Fatal(err)
	}
}

// flushAll has Redis lose all its data.
func (g *group) flushAll() {
	g.t.Helper()
	g.do(func(ctx context.Context) error { return g.client.Do(ctx, g.client.B().Flushall().Build()).Error() })
}

func (g *group) beat(members ...*Ledger) {
	g.t.Helper()
	for _, m := range members {
		first := m.lastBeat.IsZero()
		g.do(func(ctx context.Context) error { return m.beat(ctx) })
		if first {
			othersAreThere(m)
		}
	}
}

// othersAreThere takes away the wait for other members after a start.
func othersAreThere(l *Ledger) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.back = time.Time{}
}

func (g *group) report(s counter.Span, complete bool, members ...*Ledger) {
	g.t.Helper()
	for _, m := range members {
		g.do(func(ctx context.Context) error {
			ours, err := m.Report(ctx, counter.Count{Start: s.Start, Window: s.Window, Unique: g.answers.Load(), Complete: complete, Exact: true})
			if err == nil && !ours {
				g.t.Errorf("the group has not taken %v", s)
			}
			return err
		})
	}
}

func (g *group) seal(m *Ledger, s counter.Span) counter.Count {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(g.t.Context(), time.Minute)
	defer cancel()
	c, err := m.Seal(ctx, s)
	if err != nil {
		g.t.Fatal(err)
	}
	return c
}

// notYet is what Seal says within a moment.
func (g *group) notYet(m *Ledger, s counter.Span, why string) {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(g.t.Context(), 100*time.Millisecond)
	defer cancel()
	if c, err := m.Seal(ctx, s); err == nil {
		g.t.Errorf("sealed as %+v, although %s", c, why)
	}
}

func (g *group) unpublished(m *Ledger) []counter.Span {
	g.t.Helper()
	spans, err := m.Reconcile(g.t.Context(), false)
	if err != nil {
		g.t.Fatal(err)
	}
	return spans
}

// TestEveryMemberGetsTheSameCount: whoever seals an epoch, and however many at
// once, its count is decided once, and stays when the ids are counted again and
// would be more.
func TestEveryMemberGetsTheSameCount(t *testing.T) {
	g := newGroup(t)
	a, b, c := g.member("a"), g.member("b"), g.member("c")
	s := spanEnded(0)
	g.beat(a, b, c)
	g.report(s, false, a)
	g.answers.Store(48211)
	g.report(s, true, b)
	g.answers.Store(0)
	g.report(s, false, c)
	g.counted.Store(48211)
	counts := make([]counter.Count, 9)
	var all sync.WaitGroup
	for i := range counts {
		all.Go(func() { counts[i] = g.seal([]*Ledger{a, b, c}[i%3], s) })
	}
	all.Wait()
	g.counted.Store(99999)
	counts = append(counts, g.seal(g.member("late"), s))
	for _, got := range counts {
		if !reflect.DeepEqual(got, counts[0]) {
			t.Errorf("got %+v and %+v of one epoch", counts[0], got)
		}
	}
	if got := counts[0]; got.Unique != 48211 || !got.Complete || !got.Exact || !got.Start.Equal(s.Start) || got.Window != s.Window ||
		time.Since(got.SealedAt) > time.Minute || time.Until(got.SealedAt) > time.Minute {
		t.Errorf("got %+v", got)
	}
	if n := g.seals.Load(); n != 1 {
		t.Errorf("the ids were sealed %d times", n)
	}
}

// TestSealWaitsForEveryClock: while a member that is alive has not left the
// epoch, only the skew allowed ends the waiting; one that left does not delay it,
// and a dead one no longer than that.
func TestSealWaitsForEveryClock(t *testing.T) {
	g := newGroup(t)
	hour := func(c *Config, _ *fakeIDs) { c.MaxSkew = time.Hour }
	a, b := g.member("a", hour), g.member("b", hour)
	s := spanEnded(time.Second)
	g.beat(a, b)
	g.report(s, true, a)
	g.notYet(a, s, "b is in the epoch")
	g.report(s, true, b)
	g.seal(a, s)

	// The clock of b is wild, and it is alone.
	for _, m := range []*Ledger{a, b} {
		if _, _, err := m.Leave(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	alone := g.member("alone")
	future := spanEnded(-time.Hour)
	g.beat(alone)
	g.report(future, true, alone)
	g.notYet(alone, future, "it has not begun")

	// One that was killed.
	dead := g.member("dead")
	past := spanEnded(2 * time.Second)
	g.beat(dead)
	g.report(past, true, alone)
	g.seal(alone, past)
	if n := g.seals.Load(); n != 2 {
		t.Errorf("%d epochs were sealed, want 2", n)
	}
}

// TestSealAfterAStartWaitsForTheOthers: if Redis has lost its data just before, a member that
// starts is alone in it until the others have written themselves again.
func TestSealAfterAStartWaitsForTheOthers(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	s := spanEnded(2 * time.Second)
	old := g.member("old")
	g.beat(old)
	old.Opened(s, func() uint64 { return 7 }, true)
	g.beat(old)
	g.flushAll()
	starts := g.member("starts")
	g.do(func(ctx context.Context) error { return starts.beat(ctx) })
	g.notYet(starts, s, "the other member is not heard again")
	g.beat(old)
	g.counted.Store(7)
	if c := g.seal(starts, s); c.Unique != 7 {
		t.Errorf("the record is %+v, the member that lives has answered 7", c)
	}
}

// TestRecordIsNotExactWhereIdsMayBeMissing: members that hold ids that Redis does
// not have are waited for; where that is in vain the record says so.
func TestRecordIsNotExactWhereIdsMayBeMissing(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	s := spanEnded(2 * time.Second)
	var held atomic.Bool
	holds := func(_ *Config, ids *fakeIDs) {
		ids.oldest = func() (time.Time, bool) { return s.Start, held.Load() }
	}
	a, b := g.member("a"), g.member("b", holds)
	held.Store(true)
	g.beat(a, b)
	g.report(s, true, a)
	g.notYet(a, s, "b holds ids")
	held.Store(false)
	g.beat(b)
	if c := g.seal(a, s); !c.Exact {
		t.Errorf("b has settled, and the record is %+v", c)
	}

	// It is in vain from some time on.
	s = spanEnded(2*time.Second + restoreWait)
	a, b = g.member("c"), g.member("d", holds)
	held.Store(true)
	g.report(s, true, b)
	g.report(s, true, a)
	g.beat(b)
	othersAreThere(a)
	if c := g.seal(a, s); c.Exact {
		t.Errorf("b has not settled, and the record is %+v", c)
	}
}

// TestMemberThatDoesNotReachTheLedgerIsNotLost: it has answered ids of an epoch that the
// ledger does not know to be its own. The record has them, and is not exact, also if the
// member was heard after the end: it may be so late that it opens the epoch after that. If
// it has reported a later epoch, ids that are in no report have no answer.
func TestMemberThatDoesNotReachTheLedgerIsNotLost(t *testing.T) {
	s := spanEnded(2 * time.Second) // behind the skew
	at := func(epochs int) counter.Span {
		return counter.Span{Start: s.Start.Add(time.Duration(epochs) * s.Window), Window: s.Window}
	}
	const all, reported = 20, 10
	for _, tt := range []struct {
		name   string
		opened []int // epochs from s on, each before a heartbeat
		want   counter.Count
	}{
		{"none", nil, counter.Count{Unique: all}},
		{"the one before", []int{-1}, counter.Count{Unique: all}},
		{"the one behind", []int{1}, counter.Count{Unique: reported, Exact: true}},
		{"the one behind, and a heartbeat from before comes late", []int{1, -1}, counter.Count{Unique: reported, Exact: true}},
	} {
		g := newGroup(t)
		a, b := g.member("a"), g.member("b")
		g.beat(a, b)
		for _, n := range tt.opened {
			b = g.member("b")
			b.Opened(at(n), nil, true)
			g.beat(b)
		}
		g.answers.Store(reported)
		g.counted.Store(all)
		g.report(s, true, a)
		if c := g.seal(a, s); c.Unique != tt.want.Unique || c.Exact != tt.want.Exact {
			t.Errorf("b has reported %s: the record is %+v", tt.name, c)
		}
	}
}

// TestMemberThatMayHaveAnsweredAloneIsNotLost: with fail open a member that does not reach Redis
// goes on. The ids in Redis prove nothing of it, so the record is not exact, unless the member
// has reported a later epoch.
func TestMemberThatMayHaveAnsweredAloneIsNotLost(t *testing.T) {
	t.Parallel()
	s := spanEnded(2 * time.Second) // behind the skew
	for _, tt := range []struct {
		open   bool
		opened int // the epoch, from s on, before its last heartbeat
		exact  bool
	}{{true, -1, false}, {true, 1, true}, {false, -1, true}} {
		g := newGroup(t)
		open := func(c *Config, _ *fakeIDs) { c.FailOpen = tt.open }
		a, b := g.member("a", open), g.member("b", open)
		b.Opened(counter.Span{Start: s.Start.Add(time.Duration(tt.opened) * s.Window), Window: s.Window}, nil, true)
		g.beat(a, b)
		g.answers.Store(10)
		g.counted.Store(10)
		g.report(s, true, a)
		if c := g.seal(a, s); c.Unique != 10 || c.Exact != tt.exact {
			t.Errorf("%+v: the record is %+v", tt, c)
		}
	}
}

// TestOneMemberMayAnswerAlone: the members differ in --redis-fail, as while that is changed. One
// that may have answered alone is taken into account whichever member decides, also if the ledger
// has lost its data since, and another one has learnt of it meanwhile.
func TestOneMemberMayAnswerAlone(t *testing.T) {
	t.Parallel()
	s := spanEnded(2 * time.Second) // behind the skew
	for _, tt := range []struct{ open, lost bool }{{true, false}, {true, true}, {false, true}} {
		g := newGroup(t)
		a, b := g.member("a"), g.member("b", func(c *Config, _ *fakeIDs) { c.FailOpen = tt.open })
		b.Opened(counter.Span{Start: s.Start.Add(-s.Window), Window: s.Window}, nil, true)
		g.beat(b, a)
		if tt.lost {
			g.flushAll()
			g.beat(a)
			othersAreThere(a)
		}
		g.answers.Store(10)
		g.counted.Store(10)
		g.report(s, true, a)
		if c := g.seal(a, s); c.Unique != 10 || c.Exact == tt.open {
			t.Errorf("%+v: the record is %+v", tt, c)
		}
	}
}

// TestWhatIsNotExactAtItsStartIsNotAfterAKill: a member opens an epoch whose ids it has counted
// elsewhere before, and is killed before it has reported that.
func TestWhatIsNotExactAtItsStartIsNotAfterAKill(t *testing.T) {
	t.Parallel()
	s := spanEnded(2 * time.Second) // behind the skew
	for _, exact := range []bool{true, false} {
		g := newGroup(t)
		killed, b := g.member("killed"), g.member("b")
		killed.Opened(s, func() uint64 { return 5 }, exact)
		g.beat(killed, b)
		g.counted.Store(5)
		g.report(s, true, b)
		if c := g.seal(b, s); c.Unique != 5 || c.Exact != exact {
			t.Errorf("exact at its start %t: the record is %+v", exact, c)
		}
	}
}

// TestWindowOfAStartWithoutRedisIsNotExact: with fail open another instance may have started then,
// too, answered ids alone, and been killed before the ledger knew of it.
func TestWindowOfAStartWithoutRedisIsNotExact(t *testing.T) {
	t.Parallel()
	s := spanEnded(2 * time.Second) // behind the skew
	for _, open := range []bool{false, true} {
		for _, before := range []bool{false, true} {
			g := newGroup(t)
			b := g.member("b", func(c *Config, _ *fakeIDs) { c.FailOpen = open })
			absent := func() { b.noteAbsence(true); b.noteAbsence(false) }
			if before {
				absent()
			}
			b.Opened(s, func() uint64 { return 5 }, true)
			if !before {
				absent()
			}
			g.beat(b)
			g.answers.Store(5)
			g.counted.Store(5)
			g.report(s, true, b)
			if c := g.seal(b, s); c.Unique != 5 || c.Exact == open {
				t.Errorf("fail open %t, Redis was down before the window opened %t: the record is %+v", open, before, c)
			}
		}
	}
}

// TestLineOfAnotherGroupIsClaimedThere: two groups have records of one window. An instance that went
// from one to the other with a record of the first in its spool writes that line, and
// neither group takes it for the line of the second.
func TestLineOfAnotherGroupIsClaimedThere(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	of := func(group string) func(*Config, *fakeIDs) {
		return func(c *Config, _ *fakeIDs) { c.Group = group }
	}
	first, second := g.member("a", of("first")), g.member("b", of("second"))
	g.beat(first, second)
	s, next := spanEnded(0), spanEnded(-time.Minute)
	claim := func(m *Ledger, group string, s counter.Span) (c counter.Claim) {
		t.Helper()
		g.do(func(ctx context.Context) (err error) { c, err = m.Claim(ctx, group, s); return err })
		return c
	}
	g.do(func(ctx context.Context) error { return second.Written(ctx, "second", s) })
	if c := claim(second, "first", s); c.Mine || c.Written {
		t.Errorf("the first group has a leader, and the claim of its line is %+v", c)
	}
	g.do(func(ctx context.Context) error { // its lease ends
		return g.client.Do(ctx, g.client.B().Del().Key(first.keys.leader).Build()).Error()
	})
	if c := claim(second, "first", s); !c.Mine {
		t.Errorf("the first group has no leader, and the claim of its line is %+v", c)
	}
	g.do(func(ctx context.Context) error { return second.Written(ctx, "first", next) })
	if c := claim(second, "second", next); !c.Mine {
		t.Errorf("the line of the first group is written, and the claim of that of the second is %+v", c)
	}
	if c := claim(second, "first", next); !c.Written {
		t.Errorf("the line of the first group is written, and its claim is %+v", c)
	}
}

// TestMemberThatWasRestartedIsDismissed: with fail open a killed member may go on without Redis, so
// no record is exact. The next process in its place is sure that it has ended, but keeps it on
// the list until the windows that it was in are decided. One that the group has refused, as it
// was of another length, never is.
func TestMemberThatWasRestartedIsDismissed(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	s := spanEnded(10 * time.Second)
	change := func(c *Config, _ *fakeIDs) { c.FailOpen, c.File = true, filepath.Join(t.TempDir(), "answers.json") }
	killed := g.member("killed", change)
	g.beat(killed)
	before := counter.Span{Start: s.Start.Add(-s.Window), Window: s.Window}
	killed.Opened(before, nil, true)
	g.beat(killed)
	other := killed.Opened(counter.Span{Start: before.Start.Add(-2 * time.Hour), Window: 2 * s.Window}, func() uint64 { return 0 }, true)
	g.beat(killed)
	if killed.keep(true); !other.refused.Load() {
		t.Fatal("a window of another length is taken")
	}

	change = func(c *Config, _ *fakeIDs) { c.FailOpen, c.File = true, killed.cfg.File }
	again := g.member("again", change)
	listed := func() bool {
		_, err := g.client.Do(t.Context(), g.client.B().Zscore().Key(again.keys.members).Member("killed").Build()).AsFloat64()
		return err == nil
	}
	g.beat(again)
	if again.dismiss(t.Context()); !listed() {
		t.Fatal("it is off the list at the start of the next process")
	}
	again.began = time.Now().Add(-time.Hour)
	again.Opened(s, nil, true)
	g.beat(again)
	again.began = s.Start.Add(time.Second)
	if again.dismiss(t.Context()); !listed() {
		t.Fatal("it is off the list before the window of the kill is decided")
	}
	g.report(s, true, again)
	if c := g.seal(again, s); c.Exact {
		t.Errorf("the window of the kill: %+v", c)
	}
	if c := g.seal(again, before); c.Exact {
		t.Errorf("the window before: %+v", c)
	}
	again.began = time.Now().Add(-time.Hour)
	if again.dismiss(t.Context()); listed() {
		t.Error("it is still on the list")
	}
}

// TestMemberThatIsLostWithTheLedgerIsNotForgotten: a member is killed, and the ledger loses its
// data, before the next heartbeat of another one, which has not learnt that it was in the epoch.
// It has learnt that the member was alive.
func TestMemberThatIsLostWithTheLedgerIsNotForgotten(t *testing.T) {
	t.Parallel()
	for _, killed := range []bool{true, false} {
		g := newGroup(t)
		s := spanEnded(2 * time.Second)
		a, b := g.member("a"), g.member("b")
		if killed {
			a.ids.(*fakeIDs).gone = "b"
		}
		g.beat(b, a)
		a.Opened(s, nil, true)
		g.beat(a)
		b.Opened(s, nil, true)
		g.beat(b)
		g.flushAll()
		a.lastBeat = s.Start
		g.beat(a)
		othersAreThere(a)
		if !killed {
			g.report(s, true, b)
		}
		g.report(s, true, a)
		g.beat(a)
		if c := g.seal(a, s); c.Exact == killed {
			t.Errorf("b is killed: %v; the record is %+v", killed, c)
		}
	}
}

// TestSilentMemberIsNotForgottenWithTheLedger: the ledger loses its data, or the list of the
// members alone, while one of them does not reach it. That one may go on and answer ids in later
// epochs, of which the ledger then knows nothing.
func TestSilentMemberIsNotForgottenWithTheLedger(t *testing.T) {
	t.Parallel()
	s := spanEnded(2 * time.Second) // behind the skew
	for _, tt := range []struct {
		open    bool
		command string
	}{{true, "FLUSHALL"}, {false, "FLUSHALL"}, {true, "DEL"}, {false, "DEL"}} {
		g := newGroup(t)
		open := func(c *Config, _ *fakeIDs) { c.FailOpen = tt.open }
		a, b := g.member("a", open), g.member("b", open)
		b.Opened(counter.Span{Start: s.Start.Add(-s.Window), Window: s.Window}, nil, true)
		g.beat(b, a)
		for range 2 { // each loss is mended
			lose := g.client.B().Arbitrary(tt.command)
			if tt.command == "DEL" {
				lose = lose.Keys(a.keys.members)
			}
			g.do(func(ctx context.Context) error { return g.client.Do(ctx, lose.Build()).Error() })
			g.beat(a)
			othersAreThere(a)
		}
		a.Opened(s, nil, true)
		g.beat(a)
		g.answers.Store(10)
		g.counted.Store(20) // b has reached the lanes; with fail open it need not
		g.report(s, true, a)
		if c := g.seal(a, s); c.Unique != 20 || c.Exact {
			t.Errorf("%+v: the record is %+v", tt, c)
		}
	}
}

// TestGroupLearnsOfAnEpochAndItsMemberAtOnce: an epoch that is opened while a heartbeat is
// being made, behind the count of the answers, is for the next heartbeat.
func TestGroupLearnsOfAnEpochAndItsMemberAtOnce(t *testing.T) {
	g := newGroup(t)
	a := g.member("a")
	first, second := spanEnded(time.Minute), spanEnded(0)
	none := func() uint64 { return 0 }
	a.Opened(first, none, true)
	newest := a.noteAnswers()
	a.Opened(second, none, true)
	if _, args, sent := a.beatArgs(newest); len(sent) != 1 || sent[0] != first || args[8] != unixMS(first.Start) {
		t.Errorf("the heartbeat has %v, and %s as the newest epoch; want the first alone", sent, args[8])
	}
	g.beat(a)
	for _, s := range []counter.Span{first, second} {
		if row := g.rowOf(a, s); row != "0+" {
			t.Errorf("the member has answered %q in %v; want 0 or more", row, s)
		}
	}
}

// TestSealWaitsForOthersAfterAnOutage: what the others have answered while the ledger was
// out of reach is written down before an epoch is sealed.
func TestSealWaitsForOthersAfterAnOutage(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	a, b := g.member("a"), g.member("b")
	g.beat(a, b)
	gone, end := context.WithCancel(t.Context())
	end()
	if a.beat(gone) == nil {
		t.Fatal("a beat without Redis succeeds")
	}
	s := spanEnded(memberTTL) // the last clock has turned
	g.answers.Store(10)
	g.counted.Store(20)
	g.notYet(a, s, "the beats of a fail")
	g.report(s, true, a)
	g.notYet(a, s, "b may be back in a moment")
	g.report(s, true, b)
	if c := g.seal(a, s); c.Unique != 20 || !c.Exact {
		t.Errorf("the record is %+v", c)
	}
}

// rowOf is what the ledger has of the answers of a member in an epoch.
func (g *group) rowOf(m *Ledger, s counter.Span) string {
	row, _ := g.client.Do(g.t.Context(), g.client.B().Hget().Key(m.keys.ofEpoch(s)).Field("m:"+m.member).Build()).ToString()
	return row
}

// TestLossIsMendedByTheNextBeatWhateverItIsFor: Redis is emptied, and the next beat of a
// member is one for the epoch that it has just opened. The ledger does not learn from it that
// the member has gone on without what it has answered in the epoch before: the record would
// lack that, and be exact.
func TestLossIsMendedByTheNextBeatWhateverItIsFor(t *testing.T) {
	g := newGroup(t)
	b := g.member("b")
	over, next := spanEnded(2*time.Second), spanEnded(time.Second)
	b.Opened(over, func() uint64 { return 3 }, true)
	g.beat(b)
	g.flushAll()
	b.Opened(next, func() uint64 { return 0 }, true)
	g.do(func(ctx context.Context) error { return b.beat(ctx) })
	if got, opened := g.rowOf(b, over), g.rowOf(b, next); got != "3+" || opened != "0+" {
		t.Errorf("the ledger has %q of the epoch before, and %q of the open one; want 3 or more, and 0 or more", got, opened)
	}
}

// TestAllEpochsAreWrittenAgainEachSecondHoweverShortTheyAre: a member that opens an epoch more
// often than once a second, and beats for each, still writes again what the ledger has lost.
func TestAllEpochsAreWrittenAgainEachSecondHoweverShortTheyAre(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	m := g.member("m")
	s := spanEnded(0)
	m.Opened(s, func() uint64 { return 3 }, true)
	stop, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		m.run(t.Context(), stop)
	}()
	defer func() {
		close(stop)
		<-ended
	}()
	testproc.Until(t, "the epoch is registered", func() bool { return g.rowOf(m, s) != "" })
	g.do(func(ctx context.Context) error {
		return g.client.Do(ctx, g.client.B().Del().Key(m.keys.ofEpoch(s)).Build()).Error()
	})
	testproc.Within(t, 10*beatEvery, "the epoch is written again", func() bool {
		nudge(m.wake)
		return g.rowOf(m, s) == "3+"
	})
}

// TestSealWaitsForOthersAfterALoss: Redis is emptied before a member has learnt that another
// one is in the epoch. The other one is alive, and its next beat says so: the member that
// notices the loss waits for that.
func TestSealWaitsForOthersAfterALoss(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	a, b := g.member("a"), g.member("b")
	s := spanEnded(memberTTL) // the last clock has turned
	g.beat(a, b)
	b.Opened(s, func() uint64 { return 10 }, true)
	g.beat(b)
	g.flushAll()
	g.beat(a)
	g.answers.Store(10)
	g.counted.Store(20)
	g.report(s, true, a)
	g.notYet(a, s, "b is alive, and has not beaten since the loss")
	g.report(s, true, b)
	if c := g.seal(a, s); c.Unique != 20 || !c.Exact {
		t.Errorf("the record is %+v", c)
	}
}

// TestEpochsOutliveTheirMembers: what dead members opened is found, in order, by
// one that comes later, and once it is delivered by nobody any more.
func TestEpochsOutliveTheirMembers(t *testing.T) {
	g := newGroup(t)
	dead := g.member("dead")
	var want []counter.Span
	for _, ago := range []time.Duration{3 * time.Hour, 2 * time.Hour, time.Hour} {
		want = append(want, spanEnded(ago))
	}
	for _, i := range []int{2, 0, 1} {
		dead.Opened(want[i], nil, true)
	}
	known := dead.Opened(spanEnded(-time.Minute), nil, true) // is open
	g.beat(dead)
	<-known.registered
	later := g.member("later")
	g.beat(later)
	if got := g.unpublished(later); !slices.Equal(got, want) {
		t.Fatalf("got %v, want %v", got, want)
	}
	if c := g.seal(later, want[0]); c.Complete {
		t.Errorf("nobody served the whole of it, and the record is %+v", c)
	}
	g.do(func(ctx context.Context) error { return later.Delivered(ctx, want[0]) })
	g.beat(dead) // knows of it still
	if got := g.unpublished(later); !slices.Equal(got, want[1:]) {
		t.Errorf("got %v, want %v", got, want[1:])
	}
	if claim, err := dead.Claim(t.Context(), dead.cfg.Group, want[0]); err != nil || !claim.Written {
		t.Errorf("written: %t, %v", claim.Written, err)
	}
}

// TestOneMemberPublishes: the lead stays with a member until it is silent for the
// lease, or leaves.
func TestOneMemberPublishes(t *testing.T) {
	g := newGroup(t)
	a, b := g.member("a"), g.member("b")
	s := spanEnded(0)
	for range 3 {
		g.beat(a, b)
	}
	if !a.Leading() || b.Leading() {
		t.Fatalf("leading: a %t, b %t", a.Leading(), b.Leading())
	}
	claim, err := b.Claim(t.Context(), b.cfg.Group, s)
	mine, written := claim.Mine, claim.Written
	if mine || written || err != nil {
		t.Errorf("b may write: %t, %t, %v", mine, written, err)
	}
	others, _, err := a.Leave(t.Context())
	if others != 1 || err != nil {
		t.Errorf("a left %d others, %v", others, err)
	}
	g.beat(b)
	if !b.Leading() || a.Leading() {
		t.Errorf("after a left: leading a %t, b %t", a.Leading(), b.Leading())
	}
	// b is killed: its lease ends with the key.
	c := g.member("c")
	g.beat(c)
	g.do(func(ctx context.Context) error {
		return g.client.Do(ctx, g.client.B().Del().Key(b.keys.leader).Build()).Error()
	})
	if claim, err := c.Claim(t.Context(), c.cfg.Group, s); !claim.Mine || err != nil {
		t.Errorf("c may write: %t, %v", mine, err)
	}
	g.do(func(ctx context.Context) error { return c.Written(ctx, c.cfg.Group, s) })
	if claim, err := c.Claim(t.Context(), c.cfg.Group, s); claim.Mine || !claim.Written || err != nil {
		t.Errorf("c may write again: %t, %t, %v", mine, written, err)
	}
	g.beat(b, c)
	if b.Leading() || !c.Leading() {
		t.Errorf("after b's lease: leading b %t, c %t", b.Leading(), c.Leading())
	}
}

// noRecords are Records that a test has none of.
type noRecords struct{}

func (noRecords) Append(context.Context, counter.Count) (uint64, error) { return 0, nil }
func (noRecords) Undelivered() (map[counter.Span]uint64, error) {
	return map[counter.Span]uint64{}, nil
}
func (noRecords) DeliveredTo() (uint64, <-chan struct{}) { return 0, nil }

// TestLeaderThatCannotSealGivesTheLeadAway: one instance whose Redis user lacks a right, or
// whose way to a part of the ids is cut, does not keep the others from publishing.
func TestLeaderThatCannotSealGivesTheLeadAway(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	a := g.member("a", func(_ *Config, ids *fakeIDs) { ids.fails = errors.New("NOPERM") })
	b := g.member("b")
	g.beat(a, b)
	if !a.Leading() {
		t.Fatal("the first one does not lead")
	}
	a.Opened(spanEnded(memberTTL), nil, true)
	ga, err := NewGroup(a, noRecords{}, zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	for _, f := range []func(){func() { a.run(ctx, ctx.Done()) }, func() { b.run(ctx, ctx.Done()) }, func() { _ = ga.Run(ctx) }} {
		running.Go(f)
	}
	testproc.Until(t, "the other one leads", b.Leading)
	stop()
	running.Wait()
}

// TestLastMemberKnowsThatItIs: if members leave at once, exactly one learns that it is the
// last.
func TestLastMemberKnowsThatItIs(t *testing.T) {
	g := newGroup(t)
	var members []*Ledger
	for i := range 8 {
		members = append(members, g.member(fmt.Sprint(i)))
	}
	g.beat(members...)
	var last atomic.Int64
	var all sync.WaitGroup
	for _, m := range members {
		all.Go(func() {
			others, _, err := m.Leave(context.Background())
			if err != nil {
				t.Error(err)
			}
			if others == 0 {
				last.Add(1)
			}
		})
	}
	all.Wait()
	if n := last.Load(); n != 1 {
		t.Errorf("%d of them were the last", n)
	}
	g.beat(members...) // beats no more
	if others, _, err := g.member("x").Leave(t.Context()); others != 0 || err != nil {
		t.Errorf("%d are alive, %v", others, err)
	}
}

// TestLostLedgerComesBack: after a FLUSHALL the next beat of any member that knows them
// writes again the epochs and the decided counts, because the ids are gone.
func TestLostLedgerComesBack(t *testing.T) {
	g := newGroup(t)
	a, b := g.member("a"), g.member("b")
	sealed, over := spanEnded(2*time.Second), spanEnded(time.Second)
	g.beat(a, b)
	g.counted.Store(7)
	g.answers.Store(7)
	g.report(sealed, true, a)
	g.answers.Store(0)
	g.report(sealed, true, b)
	want := g.seal(a, sealed)
	b.Opened(over, nil, true)
	g.beat(b)
	g.flushAll()
	g.counted.Store(0)
	g.beat(a, b)
	if got := g.unpublished(b); !slices.Equal(got, []counter.Span{sealed, over}) {
		t.Errorf("got %v, want %v", got, []counter.Span{sealed, over})
	}
	if got := g.seal(g.member("c"), sealed); !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// TestMemberThatHasLeftRemembersItsAnswers: the last member has left the group, and waits for the
// end of the window to publish it. If the ledger loses its data meanwhile, the record has what
// that member knows.
func TestMemberThatHasLeftRemembersItsAnswers(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	a := g.member("a")
	s := spanEnded(2 * time.Second)
	g.beat(a)
	a.Opened(s, nil, true)
	g.beat(a)
	g.answers.Store(7)
	g.report(s, true, a)
	g.do(func(ctx context.Context) error { _, _, err := a.Leave(ctx); return err })
	g.flushAll()
	if c := g.seal(a, s); c.Unique != 7 || c.Exact {
		t.Errorf("7 ids were answered and none is left in Redis: the record is %+v", c)
	}
	if ttl, err := g.client.Do(t.Context(), g.client.B().Ttl().Key(a.keys.ofEpoch(s)).Build()).AsInt64(); ttl <= 0 || err != nil {
		t.Errorf("the epoch expires in %d s, %v", ttl, err)
	}
}

// TestRecordStaysDeliveredAfterALoss: the ledger loses its data right after a record was delivered,
// before another member has learnt of that, which writes the epoch again. A heartbeat of the
// member that knows better has it marked, so that there is no second record.
func TestRecordStaysDeliveredAfterALoss(t *testing.T) {
	t.Parallel()
	for _, late := range []bool{false, true} {
		g := newGroup(t)
		a, b := g.member("a"), g.member("b")
		s := spanEnded(2 * time.Second)
		g.beat(a, b)
		g.report(s, true, a, b)
		g.beat(b)
		g.seal(a, s)
		g.do(func(ctx context.Context) error { return a.Delivered(ctx, s) })
		g.flushAll()
		g.beat(b)
		if got := g.unpublished(b); !slices.Equal(got, []counter.Span{s}) {
			t.Fatalf("b has written again %v, want %v", got, s)
		}
		if late { // its counter is behind the publisher
			g.report(s, true, a)
		}
		stop := make(chan struct{})
		var running sync.WaitGroup
		running.Go(func() { a.run(t.Context(), stop) })
		testproc.Until(t, "the record is delivered", func() bool {
			claim, err := b.Claim(t.Context(), b.cfg.Group, s)
			return err == nil && claim.Written
		})
		close(stop)
		running.Wait()
	}
}

// TestDeliveredRecordIsNotDecidedAgain: the ledger loses its data after a delivery, and only the
// delivery is reported again. A member that had not sealed the window yet decides no other count:
// it would log a reason that the record does not have, and the record would be due again.
func TestDeliveredRecordIsNotDecidedAgain(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	a, b := g.member("a"), g.member("b")
	s := spanEnded(2 * time.Second)
	g.beat(a, b)
	g.report(s, true, a, b)
	g.seal(a, s)
	g.do(func(ctx context.Context) error { return a.Delivered(ctx, s) })
	g.flushAll()
	g.beat(b, a)
	a.deliverAgain(t.Context())
	g.beat(b)
	othersAreThere(b)
	if c, err := b.Seal(t.Context(), s); !errors.Is(err, errDelivered) {
		t.Errorf("sealed %+v, %v, want %v", c, err, errDelivered)
	}
	if got := g.unpublished(b); len(got) > 0 {
		t.Errorf("%v is to be published again", got)
	}
	l := &sealedLedger{epochLedger: b}
	group, err := NewGroup(l, noRecords{}, zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	if err := group.Publish(t.Context(), counter.Count{Start: s.Start, Window: s.Window, Unique: 1}); err != nil {
		t.Errorf("Publish returns %v", err)
	}
	if err := group.take(t.Context(), s, s.End()); err != nil || l.delivered != 1 {
		t.Errorf("take returns %v, and has marked the delivery %d times", err, l.delivered)
	}
}

// sealedLedger reports every epoch as one of the group, and counts deliveries.
type sealedLedger struct {
	epochLedger
	delivered int
}

func (l *sealedLedger) Report(context.Context, counter.Count) (bool, error) { return true, nil }

func (l *sealedLedger) Delivered(ctx context.Context, s counter.Span) error {
	l.delivered++
	return l.epochLedger.Delivered(ctx, s)
}

// TestLineIsNotWrittenAgainAfterALoss: a member knows what a window came to, and the ledger loses
// that its line is written before the member learns of it. It writes no line before the one that
// did has had the time to report it again.
func TestLineIsNotWrittenAgainAfterALoss(t *testing.T) {
	t.Parallel()
	for _, beats := range []bool{false, true} {
		g := newGroup(t)
		a, b := g.member("a"), g.member("b")
		s := spanEnded(2 * time.Second)
		g.beat(a, b)
		g.report(s, true, a, b)
		g.seal(a, s)
		g.beat(b)
		if claim, err := a.Claim(t.Context(), a.cfg.Group, s); err != nil || !claim.Mine {
			t.Fatalf("a is to write the line: %+v, %v", claim, err)
		}
		g.do(func(ctx context.Context) error { return a.Written(ctx, a.cfg.Group, s) })
		g.do(func(ctx context.Context) error { return a.Delivered(ctx, s) })
		g.flushAll()
		if beats {
			g.beat(b)
		}
		if claim, err := b.Claim(t.Context(), b.cfg.Group, s); err == nil {
			t.Errorf("b has sent a heartbeat since the loss: %t; it has the claim %+v", beats, claim)
		}
		g.beat(b, a)
		a.deliverAgain(t.Context())
		othersAreThere(b)
		if claim, err := b.Claim(t.Context(), b.cfg.Group, s); err != nil || !claim.Written {
			t.Errorf("a has reported the line again: %+v, %v", claim, err)
		}
	}
}

// TestDeliveryIsOnTheDiskOfTheLeader: a leader delivers a record and is killed, and the ledger loses
// its data, before another member learns of the delivery. The next process in its place reports it
// again.
func TestDeliveryIsOnTheDiskOfTheLeader(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	s, file := spanEnded(2*time.Second), filepath.Join(t.TempDir(), "answers.json")
	kept := func(c *Config, _ *fakeIDs) { c.File = file }
	a, b := g.member("a", kept), g.member("b")
	g.beat(a, b)
	g.report(s, true, a, b)
	g.seal(a, s)
	g.beat(b)
	stop := make(chan struct{})
	var running sync.WaitGroup
	running.Go(func() { a.keepAll(stop) })
	g.do(func(ctx context.Context) error { return a.Delivered(ctx, s) })
	testproc.Until(t, "the delivery is on the disk", func() bool { return slices.Contains(g.member("a", kept).past, s) })
	close(stop)
	running.Wait()
	g.flushAll()
	g.beat(b)
	if got := g.unpublished(b); !slices.Equal(got, []counter.Span{s}) {
		t.Fatalf("b has written again %v, want %v", got, s)
	}
	again := g.member("a again", kept)
	g.beat(again)
	again.deliverAgain(t.Context())
	if got := g.unpublished(b); len(got) > 0 {
		t.Errorf("b is to publish %v again", got)
	}
}

// TestLineIsLeftToItsWriter: a leader was to write a line and has not reported it, because it was
// killed or is asleep. The next leader does not write it; the process in the place of the first
// one does, if it is not in its file, and else reports it. Only if neither comes back in time the
// next leader writes the line, and logs that there may be two.
func TestLineIsLeftToItsWriter(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	s, file := spanEnded(2*time.Second), filepath.Join(t.TempDir(), "answers.json")
	kept := func(c *Config, _ *fakeIDs) { c.File = file }
	var log testproc.Buffer
	a, b := g.member("a", kept), g.member("b", func(c *Config, _ *fakeIDs) { c.Log = zerolog.New(&log) })
	g.beat(a, b)
	g.report(s, true, a, b)
	g.seal(a, s)
	want := func(m *Ledger, want counter.Claim) {
		t.Helper()
		if got, err := m.Claim(t.Context(), m.cfg.Group, s); err != nil || got != want {
			t.Errorf("%s has the claim %+v, %v; want %+v", m.member, got, err, want)
		}
	}
	leads := func(m *Ledger) {
		t.Helper()
		g.do(func(ctx context.Context) error {
			return g.client.Do(ctx, g.client.B().Del().Key(m.keys.leader).Build()).Error()
		})
		if g.beat(m); !m.Leading() {
			t.Fatalf("%s does not lead", m.member)
		}
	}
	want(a, counter.Claim{Mine: true})
	leads(b)
	want(b, counter.Claim{})
	again := g.member("a again", kept)
	g.beat(again)
	if again.Leading() {
		t.Fatal("the next process leads")
	}
	want(again, counter.Claim{Mine: true, Unknown: true})
	want(b, counter.Claim{})
	if log.String() != "" {
		t.Errorf("logged %s", log.String())
	}

	g.do(func(ctx context.Context) error { // so long ago
		return g.client.Do(ctx, g.client.B().Hset().Key(b.keys.ofEpoch(s)).FieldValue().
			FieldValue("claimed", unixMS(time.Now().Add(-claimWait))+" "+again.member).Build()).Error()
	})
	want(b, counter.Claim{Mine: true})
	if !strings.Contains(log.String(), "may be in two counts files") {
		t.Errorf("logged %s", log.String())
	}
	want(again, counter.Claim{})
	g.do(func(ctx context.Context) error { return b.Written(ctx, b.cfg.Group, s) })
	want(again, counter.Claim{Written: true})
}

// TestMemberWithAnotherWindowStandsOutside: two windows in one group would count an
// id twice, and give two records one key. The member that comes with another one
// has no epoch and no lead; those that were first go on, and both log the two
// windows. It comes in by itself when the others are gone, and then only with labels
// behind theirs.
func TestMemberWithAnotherWindowStandsOutside(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	logs := map[string]*testproc.Buffer{"a": {}, "b": {}}
	logged := func(c *Config, _ *fakeIDs) { c.Log = zerolog.New(logs[c.Instance]) }
	minute := time.Now().Truncate(time.Minute).UTC()
	hour, next := counter.Span{Start: minute.Truncate(time.Hour), Window: time.Hour}, counter.Span{Start: minute.Truncate(time.Hour).Add(time.Hour), Window: time.Hour}
	a := g.member("a", logged)
	b := g.member("b", logged, func(c *Config, _ *fakeIDs) { c.Window = time.Hour })
	ofA := a.Opened(counter.Span{Start: minute, Window: time.Minute}, nil, true)
	g.beat(a)
	ofB := b.Opened(hour, nil, true)
	g.beat(b, a, b)
	if ofA.refused.Load() || a.standing.Load() != inside || a.Stats().Problem != "" {
		t.Errorf("the first: %+v, problem %q", ofA, a.Stats().Problem)
	}
	if p := b.Stats().Problem; !ofB.refused.Load() || b.standing.Load() != outside || !strings.Contains(p, "1h0m0s") || !strings.Contains(p, "1m0s") {
		t.Errorf("the other: %+v, problem %q", ofB, p)
	}
	for name, l := range logs {
		if got := l.String(); strings.Count(got, "level\":\"error") != 1 || !strings.Contains(got, "--window=1m0s") || !strings.Contains(got, "--window=1h0m0s") {
			t.Errorf("the log of %s: %s", name, got)
		}
	}
	alone, err := NewGroup(b, noRecords{}, b.cfg.Log)
	if err != nil {
		t.Fatal(err)
	}
	if err := alone.Publish(t.Context(), counter.Count{Start: hour.Start, Window: hour.Window, Unique: 7}); err != nil {
		t.Errorf("its epoch is published: %v", err)
	}
	if got := logs["b"].String(); !strings.Contains(got, `"ids":7`) || !strings.Contains(got, "in no record") {
		t.Errorf("it does not log that what it has answered is lost: %s", got)
	}
	if got := g.unpublished(b); slices.Contains(got, hour) {
		t.Errorf("the ledger has %v", got)
	}

	if _, _, err := a.Leave(t.Context()); err != nil {
		t.Fatal(err)
	}
	g.beat(b)
	if b.standing.Load() != outside {
		t.Error("it came in at once: the others may only be lost")
	}
	testproc.Until(t, "it comes in", func() bool {
		g.beat(b)
		return b.standing.Load() == inside
	})
	ofNext := b.Opened(next, nil, true)
	g.beat(b)
	if !ofB.refused.Load() && !minute.Equal(hour.Start) || ofNext.refused.Load() || !b.Leading() || b.Stats().Problem != "" {
		t.Errorf("epoch before those of the group %+v, behind them %+v; %+v", ofB, ofNext, b.Stats())
	}
	if last, err := b.Last(t.Context()); err != nil || last.Window != time.Hour {
		t.Errorf("the last epoch is %v, %v", last, err)
	}
}

// TestEpochIsKeptUntilTheFormIsKnown: that a member cannot look for a group of another form yet
// is no reason to drop a window.
func TestEpochIsKeptUntilTheFormIsKnown(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	a := g.member("a", func(c *Config, ids *fakeIDs) { c.FailOpen, ids.form = true, errFormUnknown })
	s := spanEnded(time.Second)
	a.Opened(s, nil, true)
	c := counter.Count{Start: s.Start, Window: s.Window, Unique: 7, Exact: true}
	if ours, err := a.Report(t.Context(), c); ours || err == nil {
		t.Errorf("the form is not known: %v, %v; want an error", ours, err)
	}
	a.ids.(*fakeIDs).form = nil
	if ours, err := a.Report(t.Context(), c); !ours || err != nil {
		t.Errorf("it is known: %v, %v", ours, err)
	}
	if got := g.unpublished(a); !slices.Contains(got, s) {
		t.Errorf("the ledger has %v", got)
	}
}

// TestLedgerLeavesNothingForEver: every key of it expires by itself.
func TestLedgerLeavesNothingForEver(t *testing.T) {
	g := newGroup(t)
	a := g.member("a", func(_ *Config, ids *fakeIDs) { ids.oldest = func() (time.Time, bool) { return time.Now(), true } })
	open, sealed, delivered := spanEnded(time.Hour), spanEnded(time.Minute), spanEnded(time.Second)
	a.Opened(open, nil, true)
	g.beat(a)
	g.report(open, true, a)
	for _, s := range []counter.Span{sealed, delivered} {
		g.report(s, true, a)
		g.seal(a, s)
	}
	g.do(func(ctx context.Context) error { return a.Delivered(ctx, delivered) })
	keys, err := g.client.Do(t.Context(), g.client.B().Keys().Pattern("*").Build()).AsStrSlice()
	if err != nil || len(keys) < 6 {
		t.Fatalf("got keys %v, %v", keys, err)
	}
	for _, k := range keys {
		ttl, err := g.client.Do(t.Context(), g.client.B().Pttl().Key(k).Build()).AsInt64()
		if err != nil || ttl <= 0 {
			t.Errorf("%s lives for %d ms, %v", k, ttl, err)
		}
		if !strings.HasPrefix(k, "verve:{a+%7Bb%7D}:5:") {
			t.Errorf("%s has another hash tag", k)
		}
	}
}

// TestKeysAreTakenIntoAccount: a record is exact only if what is counted under keys is what
// was answered under them. If ids were added without an answer, they must not be under
// keys: which of them are too many is not known.
func TestKeysAreTakenIntoAccount(t *testing.T) {
	g := newGroup(t)
	for i, c := range []struct {
		answers, answersUnder, ids, idsUnder, counted uint64
		want                                          bool
		unique                                        uint64
	}{
		{10, 4, 10, 4, 4, true, 10},
		{10, 4, 12, 4, 4, true, 10},
		{10, 4, 12, 5, 5, false, 10},
		{10, 10, 12, 12, 12, false, 12}, // the keys do not exceed the record
		{10, 4, 10, 4, 3, false, 10},    // the counts of a key are lost
		{10, 4, 9, 4, 4, false, 10},
	} {
		keys := []counter.KeyCount{{Key: "a", Unique: 1}, {Key: "b", Unique: c.counted - 1}}
		m := g.member(fmt.Sprint("m", i), func(cfg *Config, ids *fakeIDs) {
			cfg.Group = fmt.Sprint("keys ", i)
			ids.sealed = func() sealedIDs { return sealedIDs{unique: c.ids, exact: true, whole: true, under: c.idsUnder} }
			ids.keys = func() counter.KeyCounts { return counter.KeyCountsOf(keys...) }
		})
		s := spanEnded(time.Hour)
		g.beat(m)
		g.do(func(ctx context.Context) error {
			_, err := m.Report(ctx, counter.Count{
				Start: s.Start, Window: s.Window, Unique: c.answers, Exact: true,
				Keys: counter.KeyCountsOf([]counter.KeyCount{{Key: "a", Unique: 1}, {Key: "b", Unique: c.answersUnder - 1}}...),
			})
			return err
		})
		for range 2 { // as decided here, and as Redis has it
			if got := g.seal(m, s); got.Exact != c.want || got.Unique != c.unique || !slices.Equal(got.Keys.List(), keys) {
				t.Errorf("%+v: got %+v", c, got)
			}
			m = g.member(fmt.Sprint("later ", i), func(cfg *Config, ids *fakeIDs) {
				cfg.Group = fmt.Sprint("keys ", i)
				ids.keys = func() counter.KeyCounts { return counter.KeyCountsOf(keys...) }
			})
		}
	}
}

// TestDeadInstanceThatRefusedIDsIsNotVouchedFor: of a member that was killed the rest of
// the ids in Redis count as answered. If it had refused ids that may be among them, the
// record is not exact; if it had not, or has taken them back or reported since, it is. They
// may also be of another member, which has reported.
func TestDeadInstanceThatRefusedIDsIsNotVouchedFor(t *testing.T) {
	for _, tt := range []struct {
		name                       string
		refused, settled, reported bool
		unique                     uint64
		exact                      bool
		by                         string // which has refused them
	}{
		{"killed", false, false, false, 100, true, "b"},
		{"killed after it refused some", true, false, false, 100, false, "b"},
		{"killed after it has taken them back", true, true, false, 100, true, "b"},
		{"reported after it refused some", true, false, true, 60, true, "b"},
		{"killed, and the other refused some", true, false, false, 100, false, "a"},
		{"killed, and the other has taken them back", true, true, false, 100, true, "a"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := newGroup(t)
			a, b := g.member("a"), g.member("b")
			s := spanEnded(3 * time.Second)
			for _, m := range []*Ledger{a, b} {
				admitted := m.Opened(s, func() uint64 { return 20 }, true)
				g.beat(m)
				if m.member == tt.by && tt.refused {
					m.addUncertain(admitted, 2)
					g.do(func(ctx context.Context) error { return m.beat(ctx) }) // which it has woken
				}
				if m.member == tt.by && tt.settled {
					m.addUncertain(admitted, -2)
					g.do(func(ctx context.Context) error { return m.beat(ctx) })
				}
			}
			g.counted.Store(100)
			g.answers.Store(60)
			g.report(s, true, a)
			if tt.reported {
				g.answers.Store(0)
				g.report(s, true, b)
			} else { // it is silent for so long
				g.do(func(ctx context.Context) error {
					return g.client.Do(ctx, g.client.B().Zrem().Key(a.keys.members).Member("b").Build()).Error()
				})
			}
			if got := g.seal(a, s); got.Unique != tt.unique || got.Exact != tt.exact {
				t.Errorf("got %d, exact %t; want %d, %t", got.Unique, got.Exact, tt.unique, tt.exact)
			}
		})
	}
}
