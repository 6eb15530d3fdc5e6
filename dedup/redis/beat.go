package redis

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/redis/rueidis"

	"verve/counter"
)

// run sends heartbeats until stop is closed or the member has left.
func (l *Ledger) run(ctx context.Context, stop <-chan struct{}) {
	for !l.left.Load() {
		wait := beatEvery
		// Without a connection nothing is sent; Set.Health shows what fails.
		if l.beat(ctx) != nil && l.standing.Load() == unconfirmed {
			wait = firstBeats
		}
		l.deliverAgain(ctx)
		l.dismiss(ctx)
		select {
		case <-time.After(wait):
		case <-l.wake:
		case <-stop:
			return
		}
	}
}

// beat sends a heartbeat: it writes into the ledger what that must have of this member, and
// takes over what the reply has of the others. It does nothing once this member has left.
func (l *Ledger) beat(ctx context.Context) error {
	l.beating.Lock()
	defer l.beating.Unlock()
	if l.left.Load() {
		return nil
	}
	if err := l.ids.formAgrees(); err != nil {
		return err
	}
	newest := l.noteAnswers()
	l.keep(false)
	keys, args, sent := l.beatArgs(newest)

	began := time.Now()
	out, err := l.exec(ctx, beatScript, keys, args).ToArray()
	took := time.Since(began)
	var b beatReply
	if err == nil {
		b, err = parseBeat(out, sent)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	failed := l.beatErr != nil
	if l.beatErr = err; err != nil {
		return fmt.Errorf("ledger: %w", err)
	}
	if failed || b.behind || began.Sub(l.lastBeat) > memberTTL-beatEvery {
		l.back = time.Now()
	}
	if b.behind {
		l.remind()
	}
	l.lastBeat, l.beaten = began, b.now
	// Redis read its clock at some moment of the exchange, and cut it to ms.
	l.offset = time.UnixMilli(b.now).Sub(began.Add(took / 2))
	l.unsure = took/2 + time.Millisecond
	l.others, l.silent, l.alone = b.others, b.silent, b.alone
	l.lead = time.Time{}
	if b.leads {
		l.lead = began.Add(leadLease)
	}
	l.stand(b.insider, b.outsider)
	l.learn(sent, b)
	return nil
}

// noteAnswers notes what this process has answered in its epochs, and returns the start of the
// newest of them.
func (l *Ledger) noteAnswers() (newest time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.epochs {
		if e.unique != nil && e.decision == nil {
			e.answers.note(l.member, strconv.FormatUint(e.unique(), 10)+"+")
		}
	}
	return l.newest
}

// beatArgs returns the keys and arguments of beatScript, and the epochs that they name. newest
// is what noteAnswers has returned. An epoch that this process has opened since then is left
// out: it has no answers of this member yet, so the group would have the epoch, but not that
// this member is in it.
func (l *Ledger) beatArgs(newest time.Time) (keys, args []string, sent []counter.Span) {
	l.mu.Lock()
	defer l.mu.Unlock()
	keys = []string{l.keys.members, l.keys.unsettled, l.keys.windows, l.keys.leader, l.keys.epochs, l.keys.length, l.keys.opened}
	args = []string{
		l.member, ms(memberTTL), ms(keepUndelivered), ms(forgetMember),
		ms(leadLease), flag(time.Since(l.insiderAt) > memberTTL), l.unsettled(), ms(l.cfg.Window), "", strconv.Itoa(maxUnnamed),
		"-1", flag(time.Now().After(l.yields)), strconv.FormatInt(l.alone, 10), strconv.Itoa(len(l.others) + len(l.silent)),
	}
	if l.cfg.FailOpen {
		args[12] = ""
	}
	args = append(append(args, l.others...), l.silent...)
	if !newest.IsZero() {
		args[8] = unixMS(newest)
	}
	if !l.lastBeat.IsZero() {
		args[10] = strconv.FormatInt(l.beaten, 10)
	}
	for _, e := range l.epochs {
		if e.unique != nil && e.span.Start.After(newest) {
			continue
		}
		keys = append(keys, l.keys.ofEpoch(e.span))
		args = append(args, epochName(e.span), unixMS(e.span.End()))
		// Before this member has reported: an id that it answers may have been counted elsewhere.
		known, decided := e.answers, []string{"", "", flag(!e.inexact), "", ""}
		if d, r := e.decision, e.reported; d == nil && r != nil {
			decided = []string{"", flag(r.Complete && !e.wasRefused), flag(r.Exact && !e.inexact), "", strconv.FormatUint(e.under, 10)}
		} else if d != nil {
			known, decided = nil, []string{strconv.FormatUint(d.Unique, 10), flag(d.Complete), flag(d.Exact), unixMS(d.SealedAt), strconv.FormatUint(d.under, 10)}
		}
		had := flag(e.isRegistered())
		if e.ofOthers && had == "0" {
			had = "?"
		}
		args = append(append(args, decided...), had, flag(e.uncertain.Load() > 0 && !strings.HasSuffix(known[l.member], "?")), strconv.Itoa(len(known)))
		for m, n := range known {
			args = append(args, m, n)
		}
		sent = append(sent, e.span)
	}
	return keys, args, sent
}

// addUncertain adds more, which may be negative, to the number of uncertain ids of an epoch: these
// are answered 503, or soon will be, and may be in Redis, because their outcome is not known or
// they are not taken back yet. If this process is killed meanwhile, nothing distinguishes them
// from ids that it has answered ok, so the group must know before the first 503.
func (l *Ledger) addUncertain(e *ledgerEpoch, more int64) {
	e.wasUncertain.Store(true)
	if now := e.uncertain.Add(more); now == 0 || now == more {
		nudge(l.wake)
	}
}

// remind notes, when the ledger has lost data, that the members that were alive at the last
// heartbeat may have answered ids in the epochs that were open since then. One of them may have
// opened such an epoch and been killed, and no other member knows. Those that are alive report
// their own numbers. l.mu is held.
func (l *Ledger) remind() {
	for _, e := range l.epochs {
		if e.decision != nil || e.span.End().Add(l.cfg.MaxSkew).Before(l.lastBeat) {
			continue
		}
		for _, m := range l.others {
			if e.answers[m] == "" {
				e.answers.note(m, "0+")
			}
		}
	}
}

// learn takes over what the reply to a heartbeat has about the epochs that it sent. l.mu is held.
func (l *Ledger) learn(sent []counter.Span, b beatReply) {
	for i, s := range sent {
		e, a := l.find(s), b.epochs[i]
		if e == nil {
			continue
		}
		e.answers.learn(a.answers)
		if a.state != "delivered" && a.state != "refused" && slices.Contains(l.past, s) {
			l.again = append(l.again, s) // this member reports it late
		}
		e.refused.Store(a.state == "refused")
		if e.refused.Load() {
			// Not opened here: it is gone, or an earlier process in this place had another --window.
			if e.wasRefused = true; e.ofOthers || l.outsideWhy == "" && e.answers[l.member] == "" {
				l.drop(s)
			}
			continue
		}
		if !e.isRegistered() {
			close(e.registered)
		}
		switch a.state {
		case "delivered":
			l.pass(s)
		case "contradicted":
			l.contradict(e)
		case "decided":
			l.noteDecision(e, a.decision)
		}
	}
	for _, s := range b.unnamed {
		switch {
		case l.find(s) != nil:
		case slices.Contains(l.past, s):
			l.again = append(l.again, s)
		case len(l.epochs) < maxLedgerEpochs:
			l.place(s).ofOthers = true
			nudge(l.wake) // the next heartbeat reads what the ledger has of it
		}
	}
}

// deliverAgain marks epochs as delivered again if the ledger has lost that, before another member
// publishes them: after a loss other members wait for longer than this takes.
func (l *Ledger) deliverAgain(ctx context.Context) {
	l.mu.Lock()
	again := l.again
	l.again = nil
	l.mu.Unlock()
	for _, s := range again {
		if l.Delivered(ctx, s) != nil {
			return // the next heartbeat finds the epoch again
		}
	}
}

// dismiss removes the earlier processes of this instance from the members when all windows in
// which they may have answered ids are decided. With fail open no later window could be exact
// while they are listed, because they might go on without Redis.
func (l *Ledger) dismiss(ctx context.Context) {
	l.mu.Lock()
	earlier, last := l.earlier, l.began.Add(l.cfg.MaxSkew)
	due := time.Since(last) > l.cfg.Window+memberTTL &&
		!slices.ContainsFunc(l.epochs, func(e *ledgerEpoch) bool { return e.decision == nil && e.span.Start.Before(last) })
	l.mu.Unlock()
	if !due {
		return
	}
	for _, m := range earlier {
		if _, _, err := l.takeOff(ctx, m, ""); err != nil {
			return // run tries again after the next heartbeat
		}
	}
	l.mu.Lock()
	l.earlier = nil
	l.mu.Unlock()
}

// pass remembers that the record of an epoch is delivered. l.mu is held.
func (l *Ledger) pass(s counter.Span) {
	l.drop(s)
	if !slices.Contains(l.past, s) {
		l.past = append(l.past, s)
	}
	l.past = slices.Delete(l.past, 0, max(0, len(l.past)-maxPast))
}

// stand takes over which members have another window. l.mu is held.
func (l *Ledger) stand(insider, outsider string) {
	if length, member, some := strings.Cut(outsider, " "); some {
		outsider = fmt.Sprintf("instance %s has --window=%s, the group has --window=%s", member, milliseconds(length), l.cfg.Window)
		if outsider != l.outsider {
			l.cfg.Log.Error().Msg(outsider + ": that instance refuses ids until it has the window of the group")
		}
	}
	l.outsider = outsider
	was := l.outsideWhy
	length, member, out := strings.Cut(insider, " ")
	if !out {
		l.outsideWhy = ""
		l.standing.Store(inside)
		if was != "" {
			l.cfg.Log.Info().Str("was", was).Msg("this instance and its group have the same window: ids are accepted")
		}
		return
	}
	if member != "" || was == "" {
		l.outsideWhy = fmt.Sprintf("this instance has --window=%s, the group has --window=%s", l.cfg.Window, milliseconds(length))
	}
	if member != "" {
		l.outsideWhy += " (instance " + member + ")"
		l.insiderAt = time.Now()
	}
	l.standing.Store(outside)
	if was == "" {
		l.cfg.Log.Error().Msg(l.outsideWhy + ": this instance refuses ids until the two are the same, or no other instance is left")
	}
}

// milliseconds returns a number of them as a duration.
func milliseconds(n string) string {
	d, err := time.ParseDuration(n + "ms")
	if err != nil {
		return "unknown"
	}
	return d.String()
}

// beatReply is what beatScript answers.
type beatReply struct {
	now, alone        int64
	others, silent    []string // members that are alive, and the others that are listed
	leads, behind     bool     // behind: the ledger has lost data since the last beat
	insider, outsider string   // LENGTH MEMBER
	unnamed           []counter.Span
	epochs            []epochReply // of those that were named
}

type epochReply struct {
	state    string
	answers  answers   // if that is "open"
	decision *decision // if it is "decided"
}

// decision is the decided count of an epoch.
type decision struct {
	counter.Count        // without its keys
	under         uint64 // how many of the ids were counted under keys
	why           string // why it is not exact; empty if it is
}

func parseBeat(out []rueidis.RedisMessage, sent []counter.Span) (b beatReply, err error) {
	if len(out) != 5 {
		return b, fmt.Errorf("%d answers to a heartbeat", len(out))
	}
	head, err := out[0].AsStrSlice()
	others, oerr := out[1].AsStrSlice()
	unnamed, uerr := out[2].AsStrSlice()
	silent, serr := out[3].AsStrSlice()
	epochs, eerr := out[4].ToArray()
	if err = cmp.Or(err, oerr, uerr, serr, eerr); err != nil {
		return b, err
	}
	if len(head) != 6 || len(epochs) != len(sent) {
		return b, fmt.Errorf("an answer to a heartbeat of %d parts, with %d epochs of %d", len(head), len(epochs), len(sent))
	}
	b.leads, b.insider, b.outsider, b.behind, b.others = head[1] == "1", head[2], head[3], head[4] == "1", others
	b.silent = silent
	b.now, err = strconv.ParseInt(head[0], 10, 64)
	if err == nil {
		b.alone, err = strconv.ParseInt(head[5], 10, 64)
	}
	for i := 0; err == nil && i < len(unnamed); i++ {
		var s counter.Span
		s, err = parseEpochName(unnamed[i])
		b.unnamed = append(b.unnamed, s)
	}
	for i := 0; err == nil && i < len(epochs); i++ {
		var fields []string
		if fields, err = epochs[i].AsStrSlice(); err != nil {
			break
		}
		e := epochReply{state: fields[0], answers: answers{}}
		if e.state == "decided" {
			e.decision, err = parseDecision(sent[i], fields)
		} else {
			for f := 1; f+1 < len(fields); f += 2 {
				e.answers[fields[f]] = fields[f+1]
			}
		}
		b.epochs = append(b.epochs, e)
	}
	return b, err
}

// parseDecision reads {"decided", unique, complete, exact, sealed, under, why}.
func parseDecision(s counter.Span, fields []string) (*decision, error) {
	if len(fields) != 7 {
		return nil, fmt.Errorf("a decision of %d parts", len(fields))
	}
	unique, err := strconv.ParseUint(fields[1], 10, 64)
	sealed, serr := strconv.ParseInt(fields[4], 10, 64)
	under, uerr := strconv.ParseUint(fields[5], 10, 64)
	if err = cmp.Or(err, serr, uerr); err != nil {
		return nil, err
	}
	return &decision{counter.Count{
		Start: s.Start.UTC(), Window: s.Window, Unique: unique,
		Complete: fields[2] == "1", Exact: fields[3] == "1", SealedAt: time.UnixMilli(sealed).UTC(),
	}, under, fields[6]}, nil
}
