package redis

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"

	"verve/counter"
	"verve/internal/logline"
	"verve/internal/retry"
)

// epochLedger is what a Group needs of a Ledger, which documents it. Each call is atomic and
// may be repeated after an error, whatever became of it.
type epochLedger interface {
	Report(ctx context.Context, c counter.Count) (ours bool, err error)
	Seal(ctx context.Context, s counter.Span) (counter.Count, error)
	Reconcile(ctx context.Context, open bool) ([]counter.Span, error)
	Leading() bool
	LinesUnknown(upTo time.Time)
	Yield()
	Delivered(ctx context.Context, s counter.Span) error
	Leave(ctx context.Context) (others int, silent time.Duration, err error)
}

// Records is where the records of the group go: the spool of this instance, as
// package stream has it. All calls are safe for concurrent use.
type Records interface {
	// Append makes the record of a count durable and returns its place. It retries
	// until ctx ends.
	Append(ctx context.Context, c counter.Count) (place uint64, err error)
	// Undelivered returns the places of the group's records that not every sink has.
	Undelivered() (map[counter.Span]uint64, error)
	// DeliveredTo returns the place up to which every sink has the records, and a
	// channel that is closed when a record was appended or delivered since.
	DeliveredTo() (place uint64, changed <-chan struct{})
}

// Group publishes the windows of a group: it is the counter's Publisher in place of
// the stream of records, and puts the records of the group there.
//
// An instance that has left an epoch reports so and waits until the epoch is sealed. Its count
// is decided in the ledger, once. So any instance can publish the record, with the same bytes,
// even one that was not in the epoch. Only the leader does, so that instances do not fence each
// other at the broker in each window. When the leader is gone, another instance takes the lead.
// DESIGN.md, "The group", has what happens when an instance is killed at any of these steps.
//
// A leader that slept through its lease is stopped where it could publish twice: at the
// broker by the fence, and at a counts file by Claim, right before the line is written.
// Claim leaves a line for claimWait to the instance that has claimed it.
//
// The record is in the leader's spool like any other record, so a broker may be down
// for days, and Redis may lose everything meanwhile.
//
// All methods are safe for concurrent use.
type Group struct {
	ledger  epochLedger
	records Records
	log     zerolog.Logger
	wake    chan struct{} // capacity 1: an epoch was sealed

	// sealed is the group's count of the epoch that Publish saw sealed last.
	sealed atomic.Pointer[counter.Count]

	leaving context.Context // ends when the process stops
	leave   context.CancelFunc

	// taking guards what follows. It is held over exchanges with the ledger, so that a record is
	// appended once.
	taking  sync.Mutex
	term    bool      // this instance led in the last round
	failing time.Time // since when it leads and cannot take epochs that are over
	taken   time.Time // end of the latest epoch that it has taken

	// reported is the end of the epoch that Publish has reported last, as Unix nanoseconds.
	reported atomic.Int64

	// mu guards spooled: the places in the spool of the records that the ledger does not
	// have as delivered yet, also of those that the spool has delivered. An epoch is removed
	// from it only with taking held as well.
	mu      sync.Mutex
	spooled map[counter.Span]uint64
}

const (
	// groupEvery is how often an instance looks for epochs that are over and not delivered.
	groupEvery = time.Second

	// failureLogEvery samples the log of a failure that repeats.
	failureLogEvery = 30 * time.Second

	// leavePoll is how often a leaving instance looks whether another is alive, and
	// leaveTry how long it tries to report that it leaves.
	leavePoll = 50 * time.Millisecond
	leaveTry  = 2 * time.Second

	// leaveMargin is the part of the time to stop that the last leaving instance keeps for
	// publishing the open window after its end.
	leaveMargin = time.Second
)

// errGap is why the leader leaves an epoch to a later round. After a pause (a suspended machine) a
// counter opens the epoch of the present time first. It reports those that it skipped only when the
// one before them is sealed: until then the ledger lacks them, and their records are to come first.
var errGap = errors.New("the windows before one that is over are not reported yet")

// NewGroup makes the Group of an instance, which then must Run. It reads which records of an
// earlier process are still in the spool, and returns the error of reading them.
func NewGroup(l epochLedger, records Records, log zerolog.Logger) (*Group, error) {
	spooled, err := records.Undelivered()
	if err != nil {
		return nil, fmt.Errorf("group: %w", err)
	}
	leaving, leave := context.WithCancel(context.Background())
	return &Group{
		ledger: l, records: records, log: log,
		wake: make(chan struct{}, 1), leaving: leaving, leave: leave,
		spooled: spooled,
	}, nil
}

// Publish reports an epoch that this instance has left and waits for its seal. After
// Leaving it does not wait: the epoch goes on without this instance, and Leave, or
// another instance, publishes it. It tries until ctx ends; its error is that of the last try.
func (g *Group) Publish(ctx context.Context, c counter.Count) error {
	var ours bool
	if err := g.try(ctx, "an epoch is not reported to the group yet, trying again", func(ctx context.Context) (err error) {
		ours, err = g.ledger.Report(ctx, c)
		return err
	}); err != nil {
		return g.orLeft(c, err)
	}
	g.reported.Store(c.Span().End().UnixNano())
	if !ours {
		if c.Unique > 0 { // the group has lost that this instance was in it
			g.log.Error().Str("window_start", c.Start.Format(time.RFC3339Nano)).Uint64("ids", c.Unique).
				Msg("ids were answered ok without Redis, in a window that the group has not taken: they are in no record")
		}
		return nil
	}
	sealing, stop := context.WithCancel(ctx)
	defer stop()
	defer context.AfterFunc(g.leaving, stop)()
	if err := g.try(sealing, "an epoch is not sealed yet, trying again", func(ctx context.Context) error {
		sum, err := g.ledger.Seal(ctx, c.Span())
		if err == nil {
			g.sealed.Store(&sum)
		} else if errors.Is(err, errDelivered) {
			return nil
		}
		return err
	}); err != nil {
		return g.orLeft(c, err)
	}
	nudge(g.wake)
	return nil
}

// Sealed returns the count of an epoch in the whole group, if it is the last one
// that Publish saw sealed.
func (g *Group) Sealed(span counter.Span) (counter.Count, bool) {
	sum := g.sealed.Load()
	if sum == nil || sum.Span() != span {
		return counter.Count{}, false
	}
	return *sum, true
}

// orLeft returns the error of a Publish that failed with err. When the process stops
// that is nil: the ids of the epoch are in Redis, and the group publishes it.
func (g *Group) orLeft(c counter.Count, err error) error {
	if g.leaving.Err() != nil {
		g.log.Info().Str("window_start", c.Start.Format(time.RFC3339Nano)).Uint64("unique_here", c.Unique).
			Msg("this window is left to the group")
		return nil
	}
	return fmt.Errorf("publish %s: %w", c.Start.Format(time.RFC3339Nano), err)
}

// try calls f until it succeeds or ctx ends; a stop ends ctx within leaveTry.
func (g *Group) try(ctx context.Context, message string, f func(context.Context) error) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	defer context.AfterFunc(g.leaving, func() { time.AfterFunc(leaveTry, stop) })()
	var wait retry.Backoff
	log := logline.Sampler{Every: failureLogEvery}
	for {
		err := f(ctx)
		if err == nil || ctx.Err() != nil {
			return err
		}
		log.Msg(g.log.Warn().Err(err), message)
		if werr := wait.Sleep(ctx); werr != nil {
			return errors.Join(err, werr)
		}
	}
}

// Run publishes for the group while this instance is the leader, until ctx ends.
func (g *Group) Run(ctx context.Context) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	defer context.AfterFunc(g.leaving, stop)() // Leave goes on
	tick := time.NewTicker(groupEvery)
	defer tick.Stop()
	log := logline.Sampler{Every: failureLogEvery}
	var announcing sync.WaitGroup
	announcing.Go(func() { g.announce(ctx) })
	defer announcing.Wait()
	defer stop()
	for {
		_, changed := g.records.DeliveredTo()
		if err := g.round(ctx); err != nil && ctx.Err() == nil {
			log.Msg(g.log.Warn().Err(err), "the records of the group could not be published, trying again")
		}
		select {
		case <-g.wake:
		case <-changed:
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// round reports to the ledger what was delivered and, if this instance leads, puts the
// records of the epochs that are over into the spool.
func (g *Group) round(ctx context.Context) error {
	g.taking.Lock()
	defer g.taking.Unlock()
	if err := g.reportDelivered(ctx); err != nil {
		return err
	}
	reported := g.reported.Load() // before the list, which has all epochs up to it
	// Also if another instance leads: this one may be the only one that knows of a delivery.
	spans, err := g.ledger.Reconcile(ctx, false)
	if err != nil {
		return err
	}
	if !g.ledger.Leading() {
		g.term, g.failing = false, time.Time{}
		return nil
	}
	for _, s := range spans {
		if !g.ledger.Leading() {
			return nil
		}
		err := errGap
		if reported == 0 || s.Start.UnixNano() <= reported || !s.Start.After(g.taken) {
			err = g.take(ctx, s, spans[len(spans)-1].End())
		}
		if err != nil {
			g.yield()
			return err
		}
		if s.End().After(g.taken) {
			g.taken = s.End()
		}
	}
	g.term, g.failing = true, time.Time{}
	return nil
}

// yield gives the lead away if this instance has failed for leadLease, which is how long the
// others would wait for a dead leader: it may lack a right, or its way to a lane may be cut,
// while others have both. g.taking is held.
func (g *Group) yield() {
	if g.failing.IsZero() {
		g.failing = time.Now()
	} else if time.Since(g.failing) > leadLease {
		g.failing = time.Time{}
		g.ledger.Yield()
	}
}

// take seals an epoch and puts its record into the spool. g.taking is held.
func (g *Group) take(ctx context.Context, s counter.Span, upTo time.Time) error {
	g.mu.Lock()
	_, there := g.spooled[s]
	g.mu.Unlock()
	if there {
		return nil
	}
	c, err := g.ledger.Seal(ctx, s)
	if errors.Is(err, errDelivered) {
		return g.ledger.Delivered(ctx, s)
	}
	if err != nil {
		return err
	}
	if !g.term {
		// An earlier leader may have written its line without reporting it; but not the
		// line of an epoch that ends after those that are undelivered now.
		g.ledger.LinesUnknown(upTo)
	}
	index, err := g.records.Append(ctx, c)
	if err != nil {
		return err
	}
	g.mu.Lock()
	g.spooled[s] = index
	g.mu.Unlock()
	g.failing = time.Time{}
	g.log.Info().Str("window_start", c.Start.Format(time.RFC3339Nano)).Uint64("unique", c.Unique).
		Bool("complete", c.Complete).Bool("exact", c.Exact).Msg("window published for the group")
	return nil
}

// delivered returns the epochs in spooled whose records all sinks have, oldest first.
func (g *Group) delivered() (done []counter.Span) {
	floor, _ := g.records.DeliveredTo()
	g.mu.Lock()
	defer g.mu.Unlock()
	for s, index := range g.spooled {
		if index <= floor {
			done = append(done, s)
		}
	}
	slices.SortFunc(done, func(a, b counter.Span) int { return a.Start.Compare(b.Start) })
	return done
}

// reportDelivered reports to the ledger the records that all sinks have. g.taking is held.
func (g *Group) reportDelivered(ctx context.Context) error {
	for _, s := range g.delivered() {
		if err := g.ledger.Delivered(ctx, s); err != nil {
			return err
		}
		g.mu.Lock()
		delete(g.spooled, s)
		g.mu.Unlock()
	}
	return nil
}

// announce reports each record to the ledger as soon as all sinks have it, until ctx ends. round
// is too late for that if it waits for the seal of the next epoch: the other members must learn
// of the record before Redis can lose that it is delivered. Because this report may fail, the
// next round repeats it, and only then removes the epoch from spooled, where take looks for it.
func (g *Group) announce(ctx context.Context) {
	var last []counter.Span
	for {
		_, changed := g.records.DeliveredTo()
		done := g.delivered()
		for _, s := range done {
			if !slices.Contains(last, s) {
				_ = g.ledger.Delivered(ctx, s)
			}
		}
		last = done
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// Leaving announces that the process stops: Publish no longer waits for an epoch that
// goes on without this instance. Call it before the counter is sealed.
func (g *Group) Leaving() { g.leave() }

// Leave takes this instance out of its group; call it when the counter has stopped. The last
// instance to leave puts into the spool what the group has not published. That includes the open
// epoch only if it ends in time before ctx does: a window has one record per group, and an
// instance that starts within the window goes on with its ids, so the record cannot be published
// before the window ends. Call ReportDelivered when the spool has delivered all that.
func (g *Group) Leave(ctx context.Context) error {
	g.Leaving()
	others, silent, err := g.ledger.Leave(ctx)
	// An instance whose last heartbeat was before this one left may be dead, or leaving too.
	for left := time.Now(); err == nil && others > 0 && silent >= time.Since(left); {
		if err = retry.Sleep(ctx, leavePoll); err == nil {
			others, silent, err = g.ledger.Leave(ctx)
		}
	}
	if err != nil {
		return fmt.Errorf("leave the group (unpublished windows are in Redis, for the other instances or the next start): %w", err)
	}
	if others > 0 {
		return nil
	}
	spans, err := g.ledger.Reconcile(ctx, true)
	if err != nil {
		return err
	}
	deadline, bounded := ctx.Deadline()
	for _, s := range spans {
		wait := time.Until(s.End())
		if bounded && wait > 0 && time.Until(deadline) < wait+leaveMargin {
			g.log.Warn().Str("window_start", s.Start.Format(time.RFC3339Nano)).Str("over_in", wait.Round(time.Millisecond).String()).
				Msg("the last instance of the group stopped within a window: the window stays open in Redis, and the next start continues and publishes it")
			continue
		}
		if wait > 0 {
			if err := retry.Sleep(ctx, wait); err != nil {
				return err
			}
		}
		g.taking.Lock()
		g.term = false
		err := g.take(ctx, s, spans[len(spans)-1].End())
		g.taking.Unlock()
		if err != nil {
			return err
		}
	}
	return nil
}

// ReportDelivered reports to the group which records are delivered. Run does so, too; this is
// for what is delivered after it has ended. The error is that of the ledger.
func (g *Group) ReportDelivered(ctx context.Context) error {
	g.taking.Lock()
	defer g.taking.Unlock()
	return g.reportDelivered(ctx)
}
