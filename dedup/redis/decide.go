package redis

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"verve/counter"
	"verve/internal/retry"
)

// unsettled returns the starts of the oldest and the newest unsettled epoch, in Unix ms, or an
// empty text if there is none: see Set.unsettled.
func (l *Ledger) unsettled() string {
	if oldest, newest, some := l.ids.unsettled(); some {
		return unixMS(oldest) + " " + unixMS(newest)
	}
	return ""
}

// Report reports what this process knows of an epoch that it has left for good: how
// many ids it has answered as new, whether it served the whole epoch, and whether no id was
// lost. First it waits, for restoreWait at most, until ids that Redis lost are added again.
//
// It returns false for an epoch that the group has not taken: no id was added to
// it, and there is nothing to publish.
func (l *Ledger) Report(ctx context.Context, c counter.Count) (ours bool, err error) {
	s := c.Span()
	l.mu.Lock()
	e := l.place(s)
	l.mu.Unlock()
	l.final(e, c.Unique, false)
	if err = l.restoreLosses(ctx, s); err == nil {
		l.final(e, c.Unique, true)
		l.mu.Lock()
		e.under, c.Keys = c.Keys.Unique(), counter.KeyCounts{}
		e.reported = &c
		l.mu.Unlock()
		err = l.beat(ctx)
	}
	if err != nil && (e.isRegistered() || !errors.Is(err, errForeign)) {
		return false, fmt.Errorf("ledger: report %s: %w", s.Start.Format(time.RFC3339Nano), err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	// An epoch that is no longer in the list is delivered.
	if ours = l.find(s) == nil || e.isRegistered(); !ours {
		l.drop(s)
	}
	return ours, nil
}

// restoreLosses looks for losses and waits until their ids are in Redis again.
func (l *Ledger) restoreLosses(ctx context.Context, s counter.Span) error {
	if err := l.ids.noticeLosses(ctx, s.Start); err != nil {
		return err
	}
	deadline := time.Now().Add(restoreWait)
	for {
		oldest, newest, some := l.ids.unsettled()
		if !some || oldest.After(s.Start) || newest.Before(s.Start) || time.Now().After(deadline) {
			return nil
		}
		if err := retry.Sleep(ctx, restorePoll); err != nil {
			return err
		}
	}
}

// Seal waits until the epoch may be sealed, seals it, and returns its count, which is
// the same for every member as long as Redis keeps it. After an error the caller may try
// again, whatever was done.
func (l *Ledger) Seal(ctx context.Context, s counter.Span) (c counter.Count, err error) {
	d := l.decisionOf(s)
	if d == nil {
		d, err = l.awaitDecision(ctx, s)
	}
	if err == nil {
		c = d.Count
		err = l.addKeys(ctx, &c, d.under)
	}
	if err != nil {
		return counter.Count{}, fmt.Errorf("ledger: seal %s: %w", s.Start.Format(time.RFC3339Nano), err)
	}
	return c, nil
}

// awaitDecision waits until another member has decided an epoch, or decides it. The decision is
// kept: if Redis loses it before the record is delivered, the next heartbeat writes it again.
func (l *Ledger) awaitDecision(ctx context.Context, s counter.Span) (*decision, error) {
	out, err := l.awaitSeal(ctx, s)
	if err == nil && out[0] == "seal" {
		out, err = l.sealAndDecide(ctx, s, out[1:])
	}
	if err == nil && out[0] == "delivered" {
		err = errDelivered
	}
	if err != nil {
		return nil, err
	}
	d, err := parseDecision(s, out)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.place(s)
	l.noteDecision(e, d)
	return e.decision, nil
}

// addKeys adds the counts of the keys to c, which has under ids under keys by its decision.
// If Redis has lost counts since then, the record is not exact.
func (l *Ledger) addKeys(ctx context.Context, c *counter.Count, under uint64) error {
	if under == 0 {
		return nil
	}
	var err error
	if c.Keys, err = l.readKeys(ctx, c.Span()); err != nil {
		return err
	}
	if n := c.Keys.Unique(); n != under && c.Exact {
		c.Exact = false
		l.logInexact(c.Span(), fmt.Sprintf("Redis has lost the counts of keys: %d ids are left of %d", n, under))
	}
	return nil
}

// readKeys returns the counts of the keys of a sealed epoch. It keeps those that it read last.
func (l *Ledger) readKeys(ctx context.Context, s counter.Span) (counter.KeyCounts, error) {
	l.mu.Lock()
	had := l.keyed
	l.mu.Unlock()
	if had.Span() == s {
		return had.Keys, nil
	}
	keys, err := l.ids.keyCounts(ctx, s)
	if err != nil {
		return keys, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.keyed = counter.Count{Start: s.Start, Window: s.Window, Keys: keys}
	return keys, nil
}

// awaitSeal waits until the members permit the seal of an epoch; sealLane then waits for ids.
// It returns the answer of sealScript: "decided", or "seal" if this member is to seal it.
func (l *Ledger) awaitSeal(ctx context.Context, s counter.Span) ([]string, error) {
	poll := min(max(s.Window/20, 10*time.Millisecond), 100*time.Millisecond)
	keys := []string{l.keys.members, l.keys.unsettled, l.keys.ofEpoch(s), l.keys.windows, l.keys.length, l.keys.opened}
	args := []string{
		ms(memberTTL), unixMS(s.Start), unixMS(s.End()),
		ms(l.cfg.MaxSkew), ms(restoreWait), ms(sealLock), ms(keepUndelivered), "", "",
	}
	for {
		if err := l.awaitOthers(ctx); err != nil {
			return nil, err
		}
		args[7], args[8] = l.asOf()
		out, err := l.exec(ctx, sealScript, keys, append(args, l.rows(s)...)).AsStrSlice()
		if err != nil || out[0] != "wait" {
			return out, err
		}
		wait, err := time.ParseDuration(out[1] + "ms")
		if err != nil {
			return nil, err
		}
		if err := retry.Sleep(ctx, min(max(wait, time.Millisecond), poll)); err != nil {
			return nil, err
		}
	}
}

// awaitOthers waits, if this member did not reach the ledger for a time, until the others have
// had time to reach it again too. Until then the ledger takes them for dead, and lacks what
// they have answered meanwhile. It also waits after the first heartbeat of this member,
// because the ledger may have lost data just before.
func (l *Ledger) awaitOthers(ctx context.Context) error {
	for {
		if !l.othersUnheard() {
			return nil
		}
		if err := retry.Sleep(ctx, restorePoll); err != nil {
			return err
		}
	}
}

// othersUnheard reports whether the ledger may lack what other members have not written again yet.
func (l *Ledger) othersUnheard() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.beatErr != nil && !l.left.Load() || time.Since(l.back) <= memberTTL
}

// sealAndDecide seals the lanes, which counts the ids, and decides the count of the epoch. For a
// while no other member does the same: see sealLock.
func (l *Ledger) sealAndDecide(ctx context.Context, s counter.Span, members []string) ([]string, error) {
	ids, err := l.ids.sealIDs(ctx, s, sessions(members))
	if err != nil {
		return nil, err
	}
	fit := true
	if ids.under > 0 {
		keys, err := l.readKeys(ctx, s)
		if err != nil {
			return nil, err
		}
		fit = keys.Unique() == ids.under
	}
	me, at := l.asOf()
	out, err := l.exec(ctx, decideScript, []string{l.keys.epochs, l.keys.ofEpoch(s), l.keys.members, l.keys.opened, l.keys.length}, append([]string{
		strconv.FormatUint(ids.unique, 10), flag(ids.exact), flag(ids.whole), ms(keepUndelivered),
		epochName(s), unixMS(s.End()), flag(l.cfg.FailOpen),
		strconv.FormatUint(ids.under, 10), flag(fit), flag(ids.unanswered), me, at, ms(forgetMember),
	}, members...)).AsStrSlice()
	if err == nil && out[0] == "lost" {
		err = errors.New("data was lost meanwhile")
	}
	return out, err
}

// rows returns what the members have answered in an epoch, as far as this one knows.
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

// asOf returns this member and the time of its last heartbeat, for luaLost, or no member once
// this one has left.
func (l *Ledger) asOf() (me, at string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.left.Load() {
		return "", "0"
	}
	return l.member, strconv.FormatInt(l.beaten, 10)
}

// decisionOf returns the decision on an epoch, or nil if this process does not know it.
func (l *Ledger) decisionOf(s counter.Span) *decision {
	l.mu.Lock()
	defer l.mu.Unlock()
	if e := l.find(s); e != nil {
		return e.decision
	}
	return nil
}
