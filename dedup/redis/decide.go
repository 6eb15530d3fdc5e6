package redis

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/redis/rueidis"

	"verve/counter"
	"verve/internal/retry"
)

// unsettled is the range of the unsettled epochs, or empty.
func (l *Ledger) unsettled() string {
	if oldest, newest, some := l.cfg.IDs.unsettled(); some {
		return unixMS(oldest) + " " + unixMS(newest)
	}
	return ""
}

// Report says what this process knows of an epoch that it has left for good:
// whether it served the whole of it, and whether no id was lost. Ids of it that
// Redis has lost are first put back, if that takes no longer than replayWait.
//
// It returns false for an epoch that the group has not taken: no id was added to
// it, and there is nothing to publish.
func (l *Ledger) Report(ctx context.Context, c counter.Count) (ours bool, err error) {
	s := c.Span()
	l.mu.Lock()
	l.place(s)
	l.mu.Unlock()
	ours, late := l.takes(s)
	if !ours {
		err := l.beat(ctx, true)
		if err != nil && !errors.Is(err, errForeign) {
			return false, err
		}
		if ours, late = l.takes(s); !ours {
			l.mu.Lock()
			defer l.mu.Unlock()
			l.drop(s)
			return false, nil
		}
	}
	c.Complete = c.Complete && !late
	l.final(s, c.Unique, false)
	err = l.replayLosses(ctx, s)
	if err == nil {
		n := l.final(s, c.Unique, true)
		_, err = l.exec(ctx, reportScript,
			[]string{l.keys.epochs, l.keys.ofEpoch(s), l.keys.unsettled},
			[]string{l.cfg.Member, ms(keepUndelivered), spanName(s), unixMS(s.End()), flag(c.Complete), flag(c.Exact), l.unsettled(), n, strconv.FormatUint(sumOf(c.Keys), 10)})
	}
	if err != nil {
		return false, fmt.Errorf("ledger: report %s: %w", s.Start.Format(time.RFC3339Nano), err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if e := l.find(s); e != nil {
		e.reported, e.reportedAt = &c, time.Now()
	}
	return true, nil
}

// takes reports whether the group has the epoch, as far as is known here, and whether that
// was open here before. One that is known no more is delivered.
func (l *Ledger) takes(s counter.Span) (ours, late bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.find(s)
	return e == nil || e.registered, e != nil && e.late
}

// replayLosses looks for losses and waits until their ids are in Redis again.
func (l *Ledger) replayLosses(ctx context.Context, s counter.Span) error {
	if err := l.cfg.IDs.noticeLosses(ctx, s.Start); err != nil {
		return err
	}
	deadline := time.Now().Add(replayWait)
	for {
		oldest, newest, some := l.cfg.IDs.unsettled()
		if !some || oldest.After(s.Start) || newest.Before(s.Start) || time.Now().After(deadline) {
			return nil
		}
		if err := retry.Sleep(ctx, replayPoll); err != nil {
			return err
		}
	}
}

// reportAgain repeats a report that Redis may have lost since, now and then.
func (l *Ledger) reportAgain(ctx context.Context, s counter.Span) error {
	l.mu.Lock()
	e := l.find(s)
	due := e != nil && e.reported != nil && time.Since(e.reportedAt) > beatEvery
	var c counter.Count
	if due {
		c = *e.reported
	}
	l.mu.Unlock()
	if !due {
		return nil
	}
	_, err := l.Report(ctx, c)
	return err
}

// Seal waits until the epoch may be sealed, seals it, and returns what it came
// to: the same for every member, for as long as Redis keeps it. An error is for
// the caller to retry.
func (l *Ledger) Seal(ctx context.Context, s counter.Span) (counter.Count, error) {
	d := l.decided(s)
	var err error
	decides := false
	if d == nil {
		var out []rueidis.RedisMessage
		var members []string
		out, members, err = l.awaitSeal(ctx, s)
		if decides = err == nil && len(out) == 0; decides {
			out, err = l.decide(ctx, s, members)
		}
		if err == nil {
			d, err = l.keepDecision(s, out)
		}
	}
	var c counter.Count
	if err == nil {
		l.explain(s, decides)
		c = d.Count
		err = l.addKeys(ctx, &c, d.under)
	}
	if err != nil {
		return counter.Count{}, fmt.Errorf("ledger: seal %s: %w", s.Start.Format(time.RFC3339Nano), err)
	}
	return c, nil
}

// addKeys adds the counts of the keys to a decided count, with under ids under keys. If
// Redis has lost them since the decision, the record is not exact.
func (l *Ledger) addKeys(ctx context.Context, c *counter.Count, under uint64) error {
	if under == 0 {
		return nil
	}
	var err error
	if c.Keys, err = l.readKeys(ctx, c.Span()); err != nil {
		return err
	}
	if n := sumOf(c.Keys); n != under && c.Exact {
		c.Exact = false
		l.logInexact(c.Span(), fmt.Sprintf("Redis has lost the counts of keys: %d ids are left of %d", n, under))
	}
	return nil
}

// readKeys returns the keys of a sealed epoch.
func (l *Ledger) readKeys(ctx context.Context, s counter.Span) ([]counter.KeyCount, error) {
	l.mu.Lock()
	had := l.keyed
	l.mu.Unlock()
	if had.span == s {
		return had.keys, nil
	}
	keys, err := l.cfg.IDs.keyCounts(ctx, s)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.keyed = keyedSpan{s, keys}
	return keys, nil
}

// sumOf is the sum of the ids under keys.
func sumOf(keys []counter.KeyCount) (n uint64) {
	for i := range keys {
		n += keys[i].Unique
	}
	return n
}

// awaitSeal waits until the epoch may be sealed: for members, while sealLane waits for ids.
// It returns what another member has decided; or nothing if this process is to seal and
// decide, and then the members, as sealScript lists them.
func (l *Ledger) awaitSeal(ctx context.Context, s counter.Span) (decided []rueidis.RedisMessage, members []string, err error) {
	poll := min(max(s.Window/20, 10*time.Millisecond), 100*time.Millisecond)
	keys := []string{l.keys.members, l.keys.unsettled, l.keys.ofEpoch(s), l.keys.windows, l.keys.length, l.keys.opened}
	args := []string{
		ms(memberTTL), unixMS(s.Start), unixMS(s.End()),
		ms(l.cfg.MaxSkew), ms(replayWait), ms(sealLock), ms(keepUndelivered), "", "",
	}
	for {
		if err := l.othersAreBack(ctx); err != nil {
			return nil, nil, err
		}
		args[7], args[8] = l.asOf()
		out, err := l.exec(ctx, sealScript, keys, append(args, l.rows(s)...))
		if err != nil {
			return nil, nil, err
		}
		what, err := out[0].AsInt64()
		if err != nil || what == sealDecided {
			return out, nil, err
		}
		if what != sealWait {
			members, err = texts(out[1:])
			return nil, members, err
		}
		wait, err := out[1].AsInt64()
		if err != nil {
			return nil, nil, err
		}
		pause := min(max(time.Duration(wait)*time.Millisecond, time.Millisecond), poll)
		if err := retry.Sleep(ctx, pause); err != nil {
			return nil, nil, err
		}
		if err := l.reportAgain(ctx, s); err != nil {
			return nil, nil, err
		}
	}
}

// othersAreBack waits, after a time in which this member did not reach the ledger, for as
// long as it takes the others to be heard again: they are taken for dead, and what they
// have answered meanwhile is not written down. So it does after the first beat: the ledger may
// have lost data just before.
func (l *Ledger) othersAreBack(ctx context.Context) error {
	for {
		l.mu.Lock()
		failing, back := l.beatErr != nil && !l.left.Load(), time.Until(l.back.Add(memberTTL))
		l.mu.Unlock()
		if !failing && back <= 0 {
			return nil
		}
		if err := retry.Sleep(ctx, replayPoll); err != nil {
			return err
		}
	}
}

// What sealScript answers first; anything else: the caller seals.
const (
	sealDecided = 0
	sealWait    = 1
)

// decide has the lanes sealed, which counts the ids, and decides what the epoch came to. For
// a while no other member does the same: see sealLock.
func (l *Ledger) decide(ctx context.Context, s counter.Span, members []string) ([]rueidis.RedisMessage, error) {
	ids, err := l.cfg.IDs.sealIDs(ctx, s, sessions(members))
	if err != nil {
		return nil, err
	}
	fit := true
	if ids.under > 0 {
		keys, err := l.readKeys(ctx, s)
		if err != nil {
			return nil, err
		}
		fit = sumOf(keys) == ids.under
	}
	me, at := l.asOf()
	out, err := l.exec(ctx, decideScript, []string{l.keys.epochs, l.keys.ofEpoch(s), l.keys.members, l.keys.opened}, append([]string{
		strconv.FormatUint(ids.unique, 10), flag(ids.exact), flag(ids.whole), ms(keepUndelivered),
		spanName(s), unixMS(s.End()), flag(l.cfg.FailOpen),
		strconv.FormatUint(ids.under, 10), flag(fit), flag(ids.open), me, at,
	}, members...))
	if err == nil && len(out) == 1 {
		err = errors.New("data was lost meanwhile")
	}
	return out, err
}

// rows are what the members have answered in an epoch, as far as this one knows.
func (l *Ledger) rows(s counter.Span) (args []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if e := l.find(s); e != nil {
		for m, n := range e.answers {
			args = append(args, m, n)
		}
	}
	return args
}

// asOf is this member and the time of its last beat, for luaLost.
func (l *Ledger) asOf() (me, at string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.left.Load() {
		return "", "0"
	}
	return l.cfg.Member, strconv.FormatInt(l.beaten, 10)
}

// decided returns what the epoch came to, or nil if this process does not know.
func (l *Ledger) decided(s counter.Span) *decision {
	l.mu.Lock()
	defer l.mu.Unlock()
	if e := l.find(s); e != nil {
		return e.decided
	}
	return nil
}

// keepDecision reads {0, unique, complete, exact, sealed, under, why} and keeps it: should Redis
// lose it before it is delivered, the next beat writes it again.
func (l *Ledger) keepDecision(s counter.Span, out []rueidis.RedisMessage) (*decision, error) {
	fields, err := texts(out[1:])
	if err != nil {
		return nil, err
	}
	d, err := parseDecision(s, fields)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.place(s).decided = d
	return d, nil
}
