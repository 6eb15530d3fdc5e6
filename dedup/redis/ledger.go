package redis

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/rueidis"

	"verve/counter"
	"verve/dedup"
	"verve/internal/logline"
	"verve/internal/retry"
)

const (
	// beatEvery is how often a member sends a heartbeat (a beat), which shows that it is
	// alive. Each is one small script. It writes again all that the ledger must have of
	// this member, so that a Redis that lost its data has it back within one beat.
	beatEvery = time.Second

	// firstBeats is how often a heartbeat is tried until the first is answered. Until
	// then no id is added in Redis.
	firstBeats = 20 * time.Millisecond

	// memberTTL is after how long without a beat a member is taken for dead. It bounds
	// how long a record waits for a member that was killed; one that was only
	// slow finds its epoch sealed, which is never wrong.
	memberTTL = 3 * beatEvery

	// leadLease is how long the leader, which publishes, keeps the lead without a beat.
	leadLease = memberTTL

	// claimWait is how long the line of a counts file is left to the member that was to write
	// it and has not reported it: longer than a process takes to be started again. The records
	// behind that line wait as long.
	claimWait = 30 * time.Second

	// restoreWait is how long a report waits until ids that Redis lacks are added again. The
	// seal waits for such ids that much longer than for members that have not reported.
	restoreWait = 5 * time.Second

	restorePoll = 10 * time.Millisecond

	// sealLock is how long a member that begins to seal an epoch keeps all members from
	// sealing it, also itself if that fails. All would come to the same sum: the lock
	// saves work, and nothing depends on it.
	sealLock = time.Second

	// ledgerWait bounds one exchange with Redis.
	ledgerWait = 2 * time.Second

	// keepUndelivered is how long an epoch waits for a member to publish it.
	keepUndelivered = 7 * 24 * time.Hour

	// The ledger remembers delivered epochs, for a member that returns with a copy in its
	// spool: keepDelivered windows, an hour at least, no longer than keepUndelivered.
	keepDelivered    = 10_000
	minKeepDelivered = time.Hour

	// forgetMember is how long a silent member stays in the lists of members. Until then a
	// seal takes into account that it may have answered ids which it has not reported: see
	// sealScript and decideScript.
	forgetMember = 10 * time.Minute
)

// groupIDs is what a Ledger needs of a Set, which documents it.
type groupIDs interface {
	conn() (rueidis.Client, error)
	sealIDs(ctx context.Context, s counter.Span, sessions []string) (sealedIDs, error)
	noticeLosses(ctx context.Context, start time.Time) error
	unsettled() (oldest, newest time.Time, some bool)
	keyCounts(ctx context.Context, s counter.Span) (counter.KeyCounts, error)
	dropKeys(ctx context.Context, s counter.Span) error
	formAgrees() error
}

// Ledger is what the members of a group share about their epochs: which members are alive,
// which epochs are open, when one is sealed and with which count, which member publishes,
// and what was published. It is kept in Redis, under one hash tag, so that each step is
// one atomic script. All times are by the clock of Redis. Every step may be repeated,
// whatever the outcome of the first attempt.
//
// The steps of an epoch: a member that opens it writes it down; a member that has left it
// reports that; when all live members have, or the slowest clock has turned, one of
// them seals the ids and decides the count, which is then the same for all members; the
// leader publishes it and marks it as delivered.
//
// All methods are safe for concurrent use.
type Ledger struct {
	cfg    Config
	began  time.Time
	member string // the name of this one, unique for each process
	ids    groupIDs
	keys   ledgerKeys
	wake   chan struct{} // capacity 1: an epoch was opened
	unsafe chan struct{} // capacity 1: the file may lack an epoch, or a delivery

	beating  sync.Mutex // one beat at a time
	left     atomic.Bool
	standing atomic.Int32 // of this member in the group
	delivers atomic.Bool  // the file lacks a record that this member has delivered
	absent   atomic.Bool  // the server refuses the first connection: see Set.mayAnswerAlone

	keeping sync.Mutex         // guards what follows: one writes the file at a time
	kept    map[string]answers // of the epochs in the file
	unkept  logline.Sampler    // of the line that it cannot be written

	// mu guards what follows.
	mu         sync.Mutex
	epochs     []*ledgerEpoch // that this process knows of, and not as delivered, oldest first
	past       []counter.Span // epochs whose records are known to be delivered, the last ones
	again      []counter.Span // those of past that the ledger does not have as delivered
	earlier    []string       // ended processes of this instance that are still listed as members
	before     []string       // the same, also those that are no longer listed
	newest     time.Time      // start of the newest epoch that this process has opened
	lead       time.Time      // until then this member leads, as then its lease ends
	yields     time.Time      // until then it leaves the lead to others
	others     []string       // other members that are alive, as of the last beat
	silent     []string       // other members that are listed, as of the last beat
	alone      int64          // last beat of a member that may answer alone: Unix ms, by the clock of Redis
	offset     time.Duration  // how far the clock of Redis is ahead of this one
	unsure     time.Duration  // of offset
	outsideWhy string         // why this member, with another window, stands outside of its group
	insiderAt  time.Time      // when a member that keeps this one outside was last seen
	outsider   string         // another member that stands outside, and why
	unclaimed  time.Time      // epochs that ended at or before it: see LinesUnknown
	beatErr    error          // of the last beat
	lastBeat   time.Time
	beaten     int64         // when that was: Unix ms, by the clock of Redis
	absentAt   time.Time     // when absent was set last: see noteAbsence
	back       time.Time     // of the first answered beat, at the start or after a gap or a loss: see awaitOthers
	keyed      counter.Count // the counts of keys that were read last, with their epoch
}

// Standings of a member.
const (
	unconfirmed = iota // no beat has been answered
	inside             // the group has the window of this member
	outside            // the group has another one, of members that were there before: see beatScript
)

var errUnheard = errors.New("other instances have 3 s to report which records are published, as Redis may have lost that")

// errDelivered means that the record of an epoch is delivered and that Redis has lost its decision.
var errDelivered = errors.New("the record is delivered, and its count lost in Redis")

var (
	errForeign     = errors.New("ledger: Redis has a group of another version")
	errFormUnknown = errors.New("ledger: it is not known yet whether Redis has a group of another version")
)

// ledgerEpoch is an epoch that this process has opened or sealed. Ledger.mu guards all but the
// first fields, which the Set uses, too.
type ledgerEpoch struct {
	registered   chan struct{} // closed when the group has the epoch
	kept         chan struct{} // closed when this process has noted it on its disk, or has tried
	refused      atomic.Bool   // the group does not take it: no id may be added
	uncertain    atomic.Int64  // ids that are answered 503, or soon will be, and may be in Redis: see addUncertain
	wasUncertain atomic.Bool   // there were some

	span         counter.Span
	unique       func() uint64  // how many ids this process has answered as new in it so far; nil before it was opened here, and once it was left
	answers      answers        // what each member has given, as far as this process knows
	inexact      bool           // it was not exact when this process opened it, or Redis was down then: see noteAbsence
	wasRefused   bool           // refused was set at some time
	ofOthers     bool           // this process has not opened it: it only asks what the ledger has of it
	reported     *counter.Count // the count of this process, once it has left it; without the keys
	under        uint64         // how many ids of reported are under keys
	decision     *decision      // its decided count, if this process knows it
	contradicted bool           // the group has another decision, which is logged
}

func (e *ledgerEpoch) isRegistered() bool { return isClosed(e.registered) }

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// maxLedgerEpochs bounds what each beat writes again. Epochs beyond that (a broker down
// for a day) exist only in Redis and are lost with it.
const maxLedgerEpochs = 512

// maxUnnamed is how many of the newest epochs of the group a beat compares with those that
// this member names. Older ones, if the broker was down for longer, are remembered by those
// that opened them.
const maxUnnamed = 64

// maxPast bounds Ledger.past. It is more epochs than members write into the ledger again, and
// enough for those in an older state of the ledger, to which Redis may go back.
const maxPast = 4096

func openLedger(cfg Config, member string, ids groupIDs) *Ledger {
	l := &Ledger{cfg: cfg, began: time.Now(), member: member, ids: ids, keys: newLedgerKeys(cfg.Group), wake: make(chan struct{}, 1), unsafe: make(chan struct{}, 1), unkept: logline.Sampler{Every: failureLogEvery}}
	l.recall()
	return l
}

// ledgerKeys are the keys of a group's ledger, all with one hash tag.
type ledgerKeys struct {
	prefix                                      string
	members, unsettled, windows, leader, epochs string
	length, opened                              string
}

func newLedgerKeys(group string) ledgerKeys {
	// Escaped, so that no brace in the name ends the tag.
	p := "verve:{" + url.QueryEscape(group) + "}:" + strconv.Itoa(layout) + ":"
	return ledgerKeys{
		prefix:    p,
		members:   p + "members",   // sorted set: last beat, Unix ms
		unsettled: p + "unsettled", // hash: member -> starts of its oldest and its newest unsettled epoch, Unix ms
		windows:   p + "windows",   // hash: member -> length of its windows, ms
		leader:    p + "leader",    // string with an expiry: who publishes
		epochs:    p + "epochs",    // sorted set: epochs not delivered, by their end, Unix ms
		opened:    p + "opened",    // hash: member -> start of the newest epoch that it has opened, Unix ms
		length:    p + "length",    // hash: the --window of the group, ms; of its epochs the length, the first with it, the last; alone, when a member with fail open beat last
	}
}

// ofEpoch returns the key of the hash of an epoch. Its fields until the epoch is decided: "m:"
// MEMBER -> its answers (see answers), "k:" MEMBER -> how many of these are under keys, "d:"
// MEMBER -> it has refused ids that may be in Redis; complete and inexact, as reported; locked,
// while a member seals. Once it is decided: unique; under (how many of these are under keys);
// complete; exact, and if not, why; sealed (when). Then claimed (when, and by which MEMBER, the
// line of a counts file), written (that line is in the file) and delivered. The answers of the
// members have no key of their own, so they cannot be lost alone.
func (k *ledgerKeys) ofEpoch(s counter.Span) string { return k.prefix + "epoch:" + epochName(s) }

// epochName is the name of an epoch in Redis, and in the file of answers. It has the length, so
// that instances with different windows do not mix up their epochs.
func epochName(s counter.Span) string {
	return strconv.FormatInt(s.Start.UnixMilli(), 10) + ":" + strconv.FormatInt(s.Window.Milliseconds(), 10)
}

func parseEpochName(name string) (counter.Span, error) {
	var start, window int64
	if _, err := fmt.Sscanf(name, "%d:%d", &start, &window); err != nil {
		return counter.Span{}, fmt.Errorf("ledger: epoch %q: %w", name, err)
	}
	return counter.Span{Start: time.UnixMilli(start).UTC(), Window: time.Duration(window) * time.Millisecond}, nil
}

func ms(d time.Duration) string { return strconv.FormatInt(d.Milliseconds(), 10) }

func unixMS(t time.Time) string { return strconv.FormatInt(t.UnixMilli(), 10) }

func flag(b bool) string {
	if b {
		return "1"
	}
	return "0"
}

// exec runs a script with a bounded wait.
func (l *Ledger) exec(ctx context.Context, s *rueidis.Lua, keys, args []string) rueidis.RedisResult {
	ctx, cancel := context.WithTimeout(ctx, ledgerWait)
	defer cancel()
	client, err := l.ids.conn()
	if err != nil {
		return rueidis.NewErrorResult(err)
	}
	return s.Exec(ctx, client, keys, args)
}

// Opened notes an epoch that requests may enter. It does not wait: the next heartbeat registers
// the epoch, and then closes the channel registered in the result.
//
// unique returns how many ids this process has answered as new in it, at least. If the epoch is
// not exact at its start, the group must know before the first id, as this process may be killed.
func (l *Ledger) Opened(s counter.Span, unique func() uint64, exact bool) *ledgerEpoch {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.place(s)
	e.unique, e.ofOthers, e.inexact = unique, false, !exact || time.Since(l.absentAt) < memberTTL
	if s.Start.After(l.newest) {
		l.newest = s.Start
	}
	nudge(l.wake)
	nudge(l.unsafe)
	return e
}

// noteAbsence notes whether the server refuses the first connection. With fail open, other instances
// that start meanwhile answer alone, too. Such an instance may be killed before the ledger knows of
// it, so an epoch that is open until all have had time to connect is not exact.
func (l *Ledger) noteAbsence(absent bool) {
	l.absent.Store(absent)
	if !absent || !l.cfg.FailOpen {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.absentAt = time.Now()
	for _, e := range l.epochs {
		e.inexact = e.inexact || e.unique != nil
	}
}

// place returns the entry of an epoch, which it makes if there is none. Beyond maxLedgerEpochs
// the oldest ones are dropped, and this may be one of them. l.mu is held.
func (l *Ledger) place(s counter.Span) *ledgerEpoch {
	e := l.find(s)
	if e != nil {
		return e
	}
	e = &ledgerEpoch{span: s, answers: answers{}, registered: make(chan struct{}), kept: make(chan struct{})}
	if l.cfg.File == "" {
		close(e.kept)
	}
	i, _ := slices.BinarySearchFunc(l.epochs, s.Start, func(e *ledgerEpoch, start time.Time) int { return e.span.Start.Compare(start) })
	l.epochs = slices.Insert(l.epochs, i, e)
	l.epochs = slices.Delete(l.epochs, 0, max(0, len(l.epochs)-maxLedgerEpochs))
	return e
}

// find returns the entry of an epoch, or nil. l.mu is held.
func (l *Ledger) find(s counter.Span) *ledgerEpoch {
	for _, e := range slices.Backward(l.epochs) {
		if e.span == s {
			return e
		}
	}
	return nil
}

// drop takes the epoch out of what each beat writes again. l.mu is held.
func (l *Ledger) drop(s counter.Span) {
	l.epochs = slices.DeleteFunc(l.epochs, func(e *ledgerEpoch) bool { return e.span == s })
}

// Reconcile returns the epochs of the group that are over and whose records are not
// delivered, whoever opened them, oldest first; with open those that are not over as well.
// If this process knows that a record is delivered, Redis has gone back to an older state,
// and Reconcile marks the epoch again.
func (l *Ledger) Reconcile(ctx context.Context, open bool) ([]counter.Span, error) {
	names, err := l.exec(ctx, unpublishedScript, []string{l.keys.epochs}, []string{flag(open)}).AsStrSlice()
	if err != nil {
		return nil, fmt.Errorf("ledger: list epochs: %w", err)
	}
	spans := make([]counter.Span, 0, len(names))
	for _, name := range names {
		s, err := parseEpochName(name)
		if err != nil {
			return nil, err
		}
		l.mu.Lock()
		passed := slices.Contains(l.past, s)
		l.mu.Unlock()
		if !passed {
			spans = append(spans, s)
		} else if err := l.Delivered(ctx, s); err != nil {
			return nil, err
		}
	}
	slices.SortFunc(spans, func(a, b counter.Span) int { return a.Start.Compare(b.Start) })
	return spans, nil
}

// Last returns the epoch that members opened last, with a zero Window if there is
// none. It tries until Redis answers or ctx ends; its error is that of the last try.
func (l *Ledger) Last(ctx context.Context) (counter.Span, error) {
	for {
		client, err := l.ids.conn()
		if err == nil {
			var g []string
			if g, err = client.Do(ctx, client.B().Hmget().Key(l.keys.length).Field("last", "span").Build()).AsStrSlice(); err == nil {
				if g[0] == "" {
					return counter.Span{}, nil
				}
				return parseEpochName(g[0] + ":" + g[1])
			}
		}
		if retry.Sleep(ctx, firstBeats) != nil {
			return counter.Span{}, fmt.Errorf("ledger: read the last epoch: %w", err)
		}
	}
}

// Leading reports whether this member is the leader, as of its last heartbeat.
func (l *Ledger) Leading() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return time.Now().Before(l.lead)
}

// Yield gives up the lead, and does not take it again for leadLease: time for another member
// to take it.
func (l *Ledger) Yield() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lead, l.yields = time.Time{}, time.Now().Add(leadLease)
	nudge(l.wake)
}

// Claim is called right before the line of a record is written to a counts file. It returns
// whether the line is written already, and if not, whether this member is to write it: for that
// it takes the lead if no member has it. A line that another member was to write is left for
// claimWait to that member, or to the next process of that instance. If the ledger may have lost
// which lines are written, Claim returns an error until the others had the time to report them
// again.
//
// If group is another group, the record was left in the spool by an earlier process. Its line is
// claimed in the ledger of that group, of which this process is no member.
func (l *Ledger) Claim(ctx context.Context, group string, s counter.Span) (counter.Claim, error) {
	keys, me, at := l.keysOf(group), "", "0"
	if group == l.cfg.Group {
		if l.othersUnheard() {
			return counter.Claim{}, fmt.Errorf("ledger: %w", errUnheard)
		}
		me, at = l.asOf()
	}
	l.mu.Lock()
	args := append([]string{l.member, ms(leadLease), me, at, ms(claimWait)}, l.before...)
	l.mu.Unlock()
	what, err := l.exec(ctx, claimScript, []string{keys.ofEpoch(s), keys.leader, keys.members}, args).ToString()
	if err == nil && what == "lost" {
		err = errUnheard
	}
	if err != nil {
		return counter.Claim{}, fmt.Errorf("ledger: %w", err)
	}
	if what == "late" {
		l.cfg.Log.Warn().Str("window_start", s.Start.Format(time.RFC3339Nano)).
			Msg("the instance that was to write the line of this window has not reported it: it is written here, and may be in two counts files")
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return counter.Claim{
		Mine: what == "mine" || what == "again" || what == "late", Written: what == "written",
		Unknown: what == "again" || !s.End().After(l.unclaimed),
	}, nil
}

// LinesUnknown makes Claim report, for epochs that ended at or before upTo, that an earlier
// leader may have written their lines without reporting it.
func (l *Ledger) LinesUnknown(upTo time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.unclaimed = upTo
}

// Written reports that the line is in a counts file of the group.
func (l *Ledger) Written(ctx context.Context, group string, s counter.Span) error {
	return l.publish(ctx, l.keysOf(group), s, "written", keepUndelivered)
}

// keysOf are those of a group, mostly of this one.
func (l *Ledger) keysOf(group string) ledgerKeys {
	if group == l.cfg.Group {
		return l.keys
	}
	return newLedgerKeys(group)
}

func (l *Ledger) publish(ctx context.Context, keys ledgerKeys, s counter.Span, as string, keep time.Duration) error {
	if err := l.exec(ctx, publishedScript, []string{keys.epochs, keys.ofEpoch(s)}, []string{as, ms(keep), epochName(s)}).Error(); err != nil {
		return fmt.Errorf("ledger: note %s as %s: %w", s.Start.Format(time.RFC3339Nano), as, err)
	}
	return nil
}

// Delivered marks the record of the epoch as visible for good.
func (l *Ledger) Delivered(ctx context.Context, s counter.Span) error {
	keep := min(max(keepDelivered*s.Window, minKeepDelivered), keepUndelivered)
	if err := l.publish(ctx, l.keys, s, "delivered", keep); err != nil {
		return err
	}
	if d := l.decisionOf(s); d != nil && d.under > 0 {
		// If it fails they expire in a week.
		if err := l.ids.dropKeys(ctx, s); err != nil && ctx.Err() == nil {
			l.cfg.Log.Warn().Err(err).Msg("the counts of the keys of a delivered window stay in Redis for a week")
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pass(s)
	l.delivers.Store(true)
	nudge(l.unsafe)
	return nil
}

// Leave takes this member out of the group: no seal waits for it any more. It returns how
// many others are alive, and how long ago the last heartbeat of one of them was. It may be
// called again, for the state at that time.
func (l *Ledger) Leave(ctx context.Context) (others int, silent time.Duration, err error) {
	// The ledger may have lost numbers that only this member remembers. They are also in its
	// file (keep, below), so the stop goes on if this heartbeat fails.
	_ = l.beat(ctx)
	if !l.left.Swap(true) { // from here on no heartbeat is sent: it would list this member again
		l.beating.Lock()
		defer l.beating.Unlock()
		l.mu.Lock()
		l.lead = time.Time{}
		l.mu.Unlock()
		l.keep(true)
	}
	return l.takeOff(ctx, l.member, l.unsettled())
}

// takeOff removes a member from the list. It returns how many others are alive, and how long ago
// the last heartbeat of one of them was.
func (l *Ledger) takeOff(ctx context.Context, member, unsettled string) (others int, silent time.Duration, err error) {
	n, err := l.exec(ctx, leaveScript,
		[]string{l.keys.members, l.keys.unsettled, l.keys.windows, l.keys.leader, l.keys.opened},
		[]string{member, ms(memberTTL), unsettled}).AsIntSlice()
	if err != nil {
		return 0, 0, fmt.Errorf("ledger: %w", err)
	}
	return int(n[0]), time.Duration(n[1]) * time.Millisecond, nil
}

// Stats returns what the last heartbeat has shown.
func (l *Ledger) Stats() dedup.LedgerStats {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := dedup.LedgerStats{Members: len(l.others) + 1, Leading: time.Now().Before(l.lead), Offset: l.offset, Waiting: len(l.epochs)}
	if l.lastBeat.IsZero() {
		return s
	}
	off := l.offset.Abs() - l.unsure
	open := l.open()
	switch {
	case l.outsideWhy != "":
		s.Problem = l.outsideWhy
	case open != nil && open.refused.Load():
		s.Problem = fmt.Sprintf("the group had windows of another length that ended behind the start of the open one: ids are taken from %s on, in windows of %s",
			open.span.End().Format(time.RFC3339Nano), l.cfg.Window)
	case off > l.cfg.MaxSkew:
		which := "behind"
		if l.offset < 0 {
			which = "ahead of"
		}
		s.Problem = fmt.Sprintf("the clock is %v %s that of Redis, %v are allowed", off.Round(time.Millisecond), which, l.cfg.MaxSkew)
	}
	return s
}

// open returns the newest epoch that requests of this process may enter, or nil. l.mu is held.
func (l *Ledger) open() *ledgerEpoch {
	for _, e := range slices.Backward(l.epochs) {
		if e.unique != nil {
			return e
		}
	}
	return nil
}

// IsDelivered reports whether the record of an epoch that this instance has left
// is known to be delivered, by whichever instance.
func (l *Ledger) IsDelivered(start time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return !slices.ContainsFunc(l.epochs, func(e *ledgerEpoch) bool { return e.span.Start.Equal(start) })
}
