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

// run beats until stop is closed or the member has left: with all epochs each second, however
// often it is woken in between.
func (l *Ledger) run(ctx context.Context, stop <-chan struct{}) {
	tick := time.NewTicker(beatEvery)
	defer tick.Stop()
	for all := true; !l.left.Load(); {
		// Without a connection nothing is sent; Stats tells of what fails.
		err := l.beat(ctx, all)
		l.deliverAgain(ctx)
		switch {
		case err != nil && l.standing.Load() == unheard:
			tick.Reset(firstBeats)
		case all:
			tick.Reset(beatEvery)
		}
		select {
		case <-tick.C:
			all = true
		case <-l.wake:
			all = false
		case <-stop:
			return
		}
	}
}

// beat writes to Redis what it must know of this member: with all epochs, or with
// those only that it does not know yet.
func (l *Ledger) beat(ctx context.Context, all bool) error {
	l.beating.Lock()
	defer l.beating.Unlock()
	if l.left.Load() {
		return nil
	}
	if l.cfg.IDs.foreign() {
		return errForeign
	}
	newest := l.noteAnswers()
	l.keep(false)
	keys, args, sent := l.beatArgs(all, newest)

	began := time.Now()
	out, err := l.exec(ctx, beatScript, keys, args)
	if err == nil && len(out) == 1 { // it has lost data, and wants all
		keys, args, sent = l.beatArgs(true, newest)
		began = time.Now()
		out, err = l.exec(ctx, beatScript, keys, args)
	}
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
	l.others = b.others
	l.lead = time.Time{}
	if b.leads == 1 {
		l.lead = began.Add(leadLease)
	}
	l.stand(b.odd, b.strange)
	l.learn(sent, b)
	return nil
}

// noteAnswers notes what this process has answered in its epochs, and returns the start of the
// newest of them.
func (l *Ledger) noteAnswers() (newest time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.epochs {
		e.count(l.cfg.Member)
	}
	return l.newest
}

// beatArgs are the keys and arguments of beatScript, and the epochs in them: those that
// this process has opened up to the newest that noteAnswers has returned. One that was opened
// since has no answers of this member yet, so the group would know the epoch, but not
// that this member is in it.
func (l *Ledger) beatArgs(all bool, newest time.Time) (keys, args []string, sent []counter.Span) {
	l.mu.Lock()
	defer l.mu.Unlock()
	keys = []string{l.keys.members, l.keys.unsettled, l.keys.windows, l.keys.leader, l.keys.epochs, l.keys.length, l.keys.opened}
	args = []string{
		l.cfg.Member, ms(memberTTL), ms(keepUndelivered), ms(forgetMember),
		ms(leadLease), flag(time.Since(l.oddAt) > memberTTL), l.unsettled(), ms(l.cfg.Window), "", strconv.Itoa(maxUnnamed),
		"-1", flag(all), flag(time.Now().After(l.yields)),
	}
	if !newest.IsZero() {
		args[8] = unixMS(newest)
	}
	if !l.lastBeat.IsZero() {
		args[10] = strconv.FormatInt(l.beaten, 10)
	}
	for _, e := range l.epochs {
		e.uncertainSent = e.uncertain.Load() > 0
		if e.registered && !all && e.uncertainSent == e.uncertainKnown || e.told != nil && e.span.Start.After(newest) {
			continue
		}
		keys = append(keys, l.keys.ofEpoch(e.span))
		args = append(args, spanName(e.span), unixMS(e.span.End()))
		known := e.answers
		if d := e.decided; d != nil {
			args = append(args, strconv.FormatUint(d.Unique, 10), flag(d.Complete), flag(d.Exact), unixMS(d.SealedAt), strconv.FormatUint(d.under, 10))
			known = nil
		} else {
			args = append(args, "", "", "", "", "")
		}
		had := flag(e.registered)
		if e.asks && !e.registered {
			had = "?"
		}
		args = append(args, had, flag(e.uncertainSent), strconv.Itoa(len(known)))
		for m, n := range known {
			args = append(args, m, n)
		}
		sent = append(sent, e.span)
	}
	return keys, args, sent
}

// addUncertain notes how many more ids of an epoch are answered 503, or soon will be, and may be
// in Redis: their outcome is not known, or they are still to be taken back. Should this
// process be killed meanwhile, nobody can tell them from ids that it has answered ok, so the
// group is to know before the first is answered.
func (l *Ledger) addUncertain(a *admission, more int64) {
	a.wasUncertain.Store(true)
	if now := a.uncertain.Add(more); now == 0 || now == more {
		nudge(l.wake)
	}
}

// remind notes, when the ledger has lost data, that the members that were alive at the last beat
// may have answered ids in the epochs that were open since: one that is killed may have opened
// such an epoch after that beat, and no other knows. Those that live report their own numbers.
// l.mu is held.
func (l *Ledger) remind() {
	for _, e := range l.epochs {
		if e.decided != nil || e.span.End().Add(l.cfg.MaxSkew).Before(l.lastBeat) {
			continue
		}
		for _, m := range l.others {
			if e.answers[m] == "" {
				e.answers.note(m, "0+")
			}
		}
	}
}

// learn takes over what a beat has answered about the epochs that it sent. l.mu is held.
func (l *Ledger) learn(sent []counter.Span, b beatReply) {
	for i, s := range sent {
		e, state := l.find(s), b.states[i]
		if e == nil {
			continue
		}
		e.answers.learn(b.answers[i])
		if state != beatDelivered && state != beatRefused && slices.Contains(l.past, s) {
			l.again = append(l.again, s) // this member reports it late
		}
		e.refused.Store(state == beatRefused)
		if state == beatRefused {
			if e.late = true; e.asks {
				l.drop(s) // it is gone
			}
			continue
		}
		e.uncertainKnown = e.uncertainSent
		if !e.registered {
			e.registered = true
			close(e.known)
		}
		switch state {
		case beatDelivered:
			l.pass(s)
		case beatContradicted:
			l.contradict(e)
		case beatDecided:
			e.decided = b.decided[i]
		}
	}
	for _, s := range b.unnamed {
		switch {
		case l.find(s) != nil:
		case slices.Contains(l.past, s):
			l.again = append(l.again, s)
		case len(l.epochs) < maxLedgerEpochs:
			l.place(s).asks = true
			nudge(l.wake) // the next beat reads what there is of it
		}
	}
}

// deliverAgain marks epochs whose records are delivered, and of which the ledger has lost that,
// before another member publishes them: after a loss that one waits for longer than this takes.
func (l *Ledger) deliverAgain(ctx context.Context) {
	l.mu.Lock()
	again := l.again
	l.again = nil
	l.mu.Unlock()
	for _, s := range again {
		if l.Delivered(ctx, s) != nil {
			return // the next beat finds it again
		}
	}
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
func (l *Ledger) stand(odd, strange string) {
	if strange != "" {
		window, member, _ := strings.Cut(strange, " ")
		strange = fmt.Sprintf("instance %s has --window=%s, the group has --window=%s", member, milliseconds(window), l.cfg.Window)
		if strange != l.strange {
			l.cfg.Log.Error().Msg(strange + ": that instance refuses ids until it has the window of the group")
		}
	}
	l.strange = strange
	was := l.odd
	if odd == "" {
		l.odd = ""
		l.standing.Store(inside)
		if was != "" {
			l.cfg.Log.Info().Str("was", was).Msg("this instance and its group have the same window: ids are accepted")
		}
		return
	}
	window, member, _ := strings.Cut(odd, " ")
	if member != "" {
		l.oddAt = time.Now()
	}
	if member != "" || was == "" {
		l.odd = fmt.Sprintf("this instance has --window=%s, the group has --window=%s", l.cfg.Window, milliseconds(window))
		if member != "" {
			l.odd += " (instance " + member + ")"
		}
	}
	l.standing.Store(outside)
	if was == "" {
		l.cfg.Log.Error().Msg(l.odd + ": this instance refuses ids until the two are the same, or no other instance is left")
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

// What beatScript answers of an epoch. 0: the group has it, and no more.
const (
	beatDelivered    = 2 // its record is delivered
	beatRefused      = 3 // the group does not take it
	beatContradicted = 4 // it came to another sum than the one known here
	beatDecided      = 5 // what it came to is not known here, and is in the answer
)

// beatReply is what beatScript replies.
type beatReply struct {
	now, leads   int64
	others       []string    // members that are alive
	odd, strange string      // LENGTH MEMBER
	states       []int64     // of each epoch
	answers      []answers   // of each epoch
	decided      []*decision // where the state is beatDecided
	unnamed      []counter.Span
	behind       bool // the ledger has lost data since the last beat
}

// decision is what an epoch came to.
type decision struct {
	counter.Count        // without its keys
	under         uint64 // the ids that were counted under keys
	why           string // the reason why it is not exact
}

func parseBeat(out []rueidis.RedisMessage, sent []counter.Span) (b beatReply, err error) {
	if len(out) != 9 {
		return b, fmt.Errorf("%d answers to a beat", len(out))
	}
	n, err := numbers(out[:2])
	others, oerr := out[2].AsStrSlice()
	who, werr := texts(out[3:5])
	states, serr := out[5].AsIntSlice()
	unnamed, uerr := out[7].AsStrSlice()
	behind, berr := out[8].AsInt64()
	switch err = cmp.Or(err, oerr, werr, serr, uerr, berr); {
	case err != nil:
		return b, err
	case len(states) != len(sent):
		return b, fmt.Errorf("%d states of %d epochs", len(states), len(sent))
	}
	b = beatReply{now: n[0], leads: n[1], others: others, odd: who[0], strange: who[1], states: states, behind: behind == 1}
	for _, name := range unnamed {
		s, err := parseSpan(name)
		if err != nil {
			return b, err
		}
		b.unnamed = append(b.unnamed, s)
	}
	return b, b.parseEpochs(out[6], sent)
}

// parseEpochs reads what is answered of each epoch.
func (b *beatReply) parseEpochs(m rueidis.RedisMessage, sent []counter.Span) error {
	list, err := m.ToArray()
	if err != nil || len(list) != len(sent) {
		return fmt.Errorf("answers of %d epochs, not %d: %w", len(list), len(sent), err)
	}
	b.answers, b.decided = make([]answers, len(list)), make([]*decision, len(list))
	for i := range list {
		fields, err := list[i].AsStrSlice()
		if err != nil {
			return err
		}
		if b.states[i] == beatDecided {
			if b.decided[i], err = parseDecision(sent[i], fields); err != nil {
				return err
			}
			continue
		}
		b.answers[i] = answers{}
		for f := 0; f+1 < len(fields); f += 2 {
			b.answers[i][fields[f]] = fields[f+1]
		}
	}
	return nil
}

// parseDecision reads {unique, complete, exact, sealed, under, why}.
func parseDecision(s counter.Span, fields []string) (*decision, error) {
	if len(fields) != 6 {
		return nil, fmt.Errorf("a decision of %d parts", len(fields))
	}
	unique, err := strconv.ParseUint(fields[0], 10, 64)
	sealed, serr := strconv.ParseInt(fields[3], 10, 64)
	under, uerr := strconv.ParseUint(cmp.Or(fields[4], "0"), 10, 64)
	if err = cmp.Or(err, serr, uerr); err != nil {
		return nil, err
	}
	return &decision{counter.Count{
		Start: s.Start.UTC(), Window: s.Window, Unique: unique,
		Complete: fields[1] == "1", Exact: fields[2] == "1", SealedAt: time.UnixMilli(sealed).UTC(),
	}, under, fields[5]}, nil
}
