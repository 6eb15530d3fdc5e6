package redis

import (
	"encoding/json"
	"errors"
	"io/fs"
	"maps"
	"os"
	"strconv"
	"strings"
	"time"

	"verve/counter"
	"verve/internal/durable"
)

// answers is how many ids each member of a group has answered as new in an epoch:
//
//	"N+"  N at least: it has not left the epoch
//	"N"   N, final: it has left the epoch; "0": it has no part in it
//	"N?"  the same, and it has refused ids that may stay in Redis for good; "0?" also if
//	      all of those were taken back, because an older state of Redis may have them
//
// Whether a record is exact depends on these numbers: see decideScript. So they are kept in
// three places: with the epoch in Redis; by each member, which gets them in the replies to
// its heartbeats and writes them again; and on the disk of each member, because all members
// may be restarted while Redis loses its data.
type answers map[string]string

// learn takes over each number that is better than the one here: final before running, and
// the larger of two running ones.
func (a answers) learn(from answers) {
	for m, n := range from {
		a.note(m, n)
	}
}

func (a answers) note(member, n string) {
	old, some := a[member]
	running := strings.HasSuffix(old, "+")
	switch {
	case !some || n == old+"?":
	case !running:
		return // the old number is final
	case strings.HasSuffix(n, "+") && atLeast(n) <= atLeast(old):
		return
	}
	a[member] = n
}

func atLeast(n string) uint64 {
	least, _ := strconv.ParseUint(strings.TrimRight(n, "+?"), 10, 64)
	return least
}

// final notes how many ids this process has answered as new in an epoch that it has left. With
// refusals it also notes whether ids that it has refused may be in Redis: the caller has waited
// until those that can be taken back were.
func (l *Ledger) final(e *ledgerEpoch, unique uint64, refusals bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := strconv.FormatUint(unique, 10)
	e.answers.note(l.member, n)
	e.unique = nil
	if refusals && (e.uncertain.Load() > 0 || unique == 0 && e.wasUncertain.Load()) {
		e.answers.note(l.member, n+"?")
	}
}

// sessions returns the sessions of the members that have a part in an epoch. Before each
// stands the sign of its part: see sealScript.
func sessions(members []string) (list []string) {
	for _, m := range members {
		if m[0] != '0' {
			name := m[1:]
			list = append(list, m[:1]+name[strings.LastIndexByte(name, '/')+1:])
		}
	}
	return list
}

// noteDecision notes the decision on an epoch, and logs why it is not exact. The first one stays.
// l.mu is held.
func (l *Ledger) noteDecision(e *ledgerEpoch, d *decision) {
	if e.decision != nil {
		return
	}
	if e.decision = d; d.why != "" {
		l.logInexact(e.span, d.why)
	}
}

func (l *Ledger) logInexact(s counter.Span, why string) {
	l.cfg.Log.Warn().Str("window_start", s.Start.Format(time.RFC3339Nano)).Msg("the record of the window is not exact: " + why)
}

// contradict logs that a window has two records. l.mu is held.
func (l *Ledger) contradict(e *ledgerEpoch) {
	if e.contradicted || e.decision == nil {
		return
	}
	e.contradicted = true
	l.cfg.Log.Error().Str("window_start", e.span.Start.Format(time.RFC3339Nano)).Uint64("unique_here", e.decision.Unique).
		Msg("the group has decided another count for this window: two parts of it counted apart, and the window may have two records that both are wrong")
}

// kept is the file of answers.
type kept struct {
	Group   string             `json:"group"`
	Members []string           `json:"members"` // the process that has written it, and earlier ones that may still be members
	Epochs  map[string]answers `json:"epochs"`

	// Delivered are the last epochs whose records are delivered. Redis may lose that, as this
	// process is killed, before another member has learnt of it.
	Delivered []string `json:"delivered,omitempty"`
}

// keptDelivered bounds kept.Delivered. It is more than a leader delivers before another member
// learns of the first of them.
const keptDelivered = 64

// keep writes the file, with what is known of the epochs that are not decided. It does so if
// the file lacks one of them or the name of this process, and if end is set: at the stop, for
// the last numbers, and when this process has delivered a record.
func (l *Ledger) keep(end bool) {
	if l.cfg.File == "" {
		return
	}
	l.keeping.Lock()
	defer l.keeping.Unlock()
	k := kept{Group: l.cfg.Group, Epochs: map[string]answers{}}
	defer l.noteKept(k.Epochs)
	l.mu.Lock()
	k.Members = append([]string{l.member}, l.earlier...)
	end = end || l.kept == nil
	for _, s := range l.past[max(0, len(l.past)-keptDelivered):] {
		k.Delivered = append(k.Delivered, epochName(s))
	}
	for _, e := range l.epochs {
		if e.decision == nil && len(e.answers) > 0 {
			name := epochName(e.span)
			k.Epochs[name] = maps.Clone(e.answers)
			end = end || l.kept[name] == nil
		}
	}
	l.mu.Unlock()
	if !end {
		return
	}
	b, err := json.Marshal(k)
	if err == nil {
		err = durable.ReplaceFile(l.cfg.File, b, 0o600)
	}
	if err != nil {
		l.unkept.Msg(l.cfg.Log.Warn().Err(err),
			"the answers of the open window are not kept on disk: a restart of this instance forgets that it has a part in it")
		return
	}
	l.kept = k.Epochs
}

// noteKept closes ledgerEpoch.kept of the epochs that are in the file, also if it could not be
// written: the process then goes on without it.
func (l *Ledger) noteKept(epochs map[string]answers) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.epochs {
		if epochs[epochName(e.span)][l.member] != "" && !isClosed(e.kept) {
			close(e.kept)
		}
	}
}

// keepAll notes each epoch on the disk when it is opened, until stop is closed. A heartbeat does
// so too, but it may be waiting for a Redis that does not answer.
func (l *Ledger) keepAll(stop <-chan struct{}) {
	for {
		select {
		case <-l.unsafe:
		case <-stop:
			return
		}
		l.noteAnswers()
		l.keep(l.delivers.Swap(false))
	}
}

// recall reads what the last process has kept. The first heartbeat reports it.
func (l *Ledger) recall() {
	if l.cfg.File == "" {
		return
	}
	b, err := os.ReadFile(l.cfg.File)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var k kept
	if err == nil {
		err = json.Unmarshal(b, &k)
	}
	if err != nil {
		l.cfg.Log.Warn().Err(err).Msg("what the last process has answered in windows that are not published cannot be read")
		return
	}
	l.before = k.Members // also of another group: they have ended
	if k.Group != l.cfg.Group {
		return
	}
	l.earlier = k.Members
	for _, name := range k.Delivered {
		if s, err := parseEpochName(name); err == nil {
			l.past = append(l.past, s)
		}
	}
	for name, all := range k.Epochs {
		if s, err := parseEpochName(name); err == nil && time.Since(s.End()) <= keepUndelivered {
			l.place(s).answers.learn(all)
		}
	}
}
