package redis

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/rueidis"
	"github.com/rs/zerolog"

	"verve/dedup"
	"verve/internal/logline"
)

const (
	watchEvery = time.Second

	// logEvery is how often a failure that goes on is logged.
	logEvery = 10 * time.Second

	// longestWhy bounds what a reason has of an error that explanations lacks.
	longestWhy = 100
)

// health is the state of the servers, as far as it is known here.
type health struct {
	refused atomic.Bool // ids are refused because of a setting of Redis or of the group: see checkConfig
	blind   bool        // the policy cannot be read; only checkConfig uses it

	mu            sync.Mutex
	misconfigured string // why ids cannot be trusted to Redis, or this group; empty if they can
	failure       string // of the last attempt that failed; empty if the last did not
	since         time.Time
	samplers      map[string]*logline.Sampler // of each line that repeats
	rights        string                      // what the user may not do, or which part was never reached
}

// log writes a line that may repeat, sampled by its first part.
func (h *health) log(e *zerolog.Event, line, more string) {
	h.mu.Lock()
	if h.samplers == nil || len(h.samplers) > 100 {
		h.samplers = map[string]*logline.Sampler{}
	}
	if h.samplers[line] == nil {
		h.samplers[line] = &logline.Sampler{Every: logEvery}
	}
	s := h.samplers[line]
	h.mu.Unlock()
	s.Msg(e, line+more)
}

// failed notes an error of Redis or of the way to it.
func (h *health) failed(r *Set, err error) {
	text := explain(err)
	h.mu.Lock()
	if h.failure == "" {
		h.since = time.Now()
	}
	h.failure = text
	h.mu.Unlock()
	effect := "; ids get 503 until it works again"
	if r.mayAnswerAlone() {
		effect = "; this instance judges ids alone until it works again"
	}
	h.log(r.cfg.Log.Error().Err(err), text, effect)
}

// succeeded notes that Redis answers.
func (h *health) succeeded(r *Set) {
	h.mu.Lock()
	failure, since := h.failure, h.since
	h.failure = ""
	h.mu.Unlock()
	if failure != "" {
		r.cfg.Log.Info().Str("was", failure).Dur("after_ms", time.Since(since)).Msg("Redis works again")
	}
}

// explanations of the errors that Redis answers, by their first word.
var explanations = map[string]string{
	"OOM":         "Redis is out of memory",
	"READONLY":    "this Redis is a replica and refuses writes",
	"LOADING":     "Redis is loading its data",
	"CLUSTERDOWN": "the Redis cluster does not serve these ids",
	"MASTERDOWN":  "the master of this Redis is unreachable",
	"MISCONF":     "Redis cannot write to its disk and takes no ids",
	"NOREPLICAS":  "Redis has too few replicas and takes no ids",
	"NOAUTH":      "Redis requires a password",
	"WRONGPASS":   "Redis, or its Sentinel, refuses the user or the password",
	"NOPERM":      "the Redis user lacks a permission",
	"BUSY":        "Redis is busy with a script",
	"TRYAGAIN":    "a Redis slot is on the move",
	"MOVED":       "a Redis slot is on the move",
	"ASK":         "a Redis slot is on the move",
}

// deniedCommand matches the error of Redis for a command that the user may not run. It also
// matches the error of a script with such a command, which begins with another word.
var deniedCommand = regexp.MustCompile(`permissions? to run the '([^']+)' command`)

// explain returns in few words what an error means.
func explain(err error) string {
	if refused, ok := errors.AsType[*rueidis.RedisError](err); ok {
		if m := deniedCommand.FindStringSubmatch(refused.Error()); m != nil {
			return explanations["NOPERM"] + ": +" + m[1]
		}
		if strings.Contains(refused.Error(), "can't run this command") {
			return explanations["NOPERM"] // in a script: see checkRights
		}
		if strings.Contains(refused.Error(), "permissions to access") || strings.Contains(refused.Error(), "can't access at least one of the keys") {
			return explanations["NOPERM"] + ": ~verve:*"
		}
		word, _, _ := strings.Cut(refused.Error(), " ")
		if s, ok := explanations[strings.ToUpper(word)]; ok {
			return s
		}
		why, _, _ := strings.Cut(refused.Error(), ", with args") // the text of a script, or ids
		return "Redis refuses: " + strings.ToValidUTF8(why[:min(len(why), longestWhy)], "")
	}
	if _, why, own := strings.Cut(err.Error(), dedup.ErrUnavailable.Error()+": "); own {
		return why
	}
	if _, why, certificate := strings.Cut(err.Error(), "x509: "); certificate {
		return "the certificate of Redis is refused: " + why
	}
	return "Redis is unreachable"
}

// Health reports whether ids can be answered, and why not, for /readyz and whatever routes
// requests to this instance.
func (r *Set) Health() (ready bool, reason string) {
	r.health.mu.Lock()
	misconfigured, failure, rights := r.health.misconfigured, r.health.failure, r.health.rights
	r.health.mu.Unlock()
	switch {
	case misconfigured != "":
		return false, misconfigured
	case r.client.Load() == nil:
		return r.mayAnswerAlone(), cmp.Or(failure, "Redis is not connected yet")
	case r.ledger.standing.Load() == unconfirmed:
		return false, cmp.Or(rights, failure, "the group has not answered yet")
	case rights != "":
		return r.cfg.FailOpen, rights
	}
	down := 0
	for i := range r.lanes {
		l := &r.lanes[i]
		l.mu.Lock()
		if l.down {
			down++
		}
		l.mu.Unlock()
	}
	failure = cmp.Or(failure, "Redis does not answer")
	switch {
	case down == 0:
		return true, ""
	case down < len(r.lanes):
		// The rest of the cluster is down: another instance would not reach more of it.
		return true, fmt.Sprintf("%s: %d of %d parts of the ids", failure, down, len(r.lanes))
	}
	return r.cfg.FailOpen, failure
}

const noEviction = "noeviction"

var policyLine = regexp.MustCompile(`(?m)^maxmemory_policy:(\S+)`)

// watch checks the configuration and the rights, every watchEvery. With any policy other
// than noeviction a server may silently drop ids that were answered.
func (r *Set) watch() {
	t := time.NewTicker(watchEvery)
	defer t.Stop()
	reached := make([]bool, len(r.lanes))
	for {
		r.checkConfig()
		r.checkRights(reached)
		select {
		case <-r.closing:
			return
		case <-t.C:
		}
	}
}

func (r *Set) checkConfig() {
	ctx, cancel := context.WithTimeout(r.life, watchEvery)
	defer cancel()
	bad, blind := "", false
	n, err := r.agreedLanes(ctx) // first: a node that hangs takes all the time that is left
	for addr, node := range (*r.client.Load()).Nodes() {
		info, err := node.Do(ctx, node.B().Info().Section("memory").Build()).ToString()
		// A server that has no policy evicts nothing.
		if m := policyLine.FindStringSubmatch(info); m != nil && m[1] != noEviction {
			bad = fmt.Sprintf("maxmemory-policy of Redis at %s is %s, want %s", addr, m[1], noEviction)
		}
		blind = blind || isRefusal(err)
	}
	r.health.mu.Lock()
	was := r.health.misconfigured
	r.health.mu.Unlock()
	switch {
	case err != nil && r.formAgrees() != nil:
		bad = cmp.Or(bad, was) // no answer does not mean that the others are gone
	case err != nil:
	case n/layoutBase != layout:
		r.form.Store(formOther)
		bad = "an instance of the group is of a version that keeps its data in another form: stop it, or this one; a minute after it was stopped ids are taken"
	case n%layoutBase != len(r.lanes):
		r.form.Store(formOther)
		bad = fmt.Sprintf("another instance of the group spreads ids over %d parts, this one over %d: give all instances the same --redis-url", n%layoutBase, len(r.lanes))
	default:
		r.form.Store(formAgreed)
	}
	h := &r.health
	h.change(r, &h.misconfigured, bad, "ids are refused until it is changed", "ids are taken again")
	h.refused.Store(bad != "")
	if blind && !h.blind {
		r.cfg.Log.Warn().Msg("the Redis user may not run INFO memory: make sure that maxmemory-policy is " + noEviction)
	}
	h.blind = blind
}

// change sets misconfigured or rights, and logs what has come or gone.
func (h *health) change(r *Set, what *string, now, effect, over string) {
	h.mu.Lock()
	was := *what
	*what = now
	h.mu.Unlock()
	switch {
	case now != "" && now != was:
		r.cfg.Log.Error().Msg(now + "; " + effect)
	case now == "" && was != "":
		r.cfg.Log.Info().Str("was", was).Msg(over)
	}
}

// checkRights checks, without waiting for an id, that the Redis user may run each command
// that is needed, and that each lane has been reached once. If one never was, the cause is a
// setting, such as a certificate, and not an outage that passes.
func (r *Set) checkRights(reached []bool) {
	ctx, cancel := context.WithTimeout(r.life, watchEvery)
	defer cancel()
	reason := ""
	for i := range r.lanes {
		if i > 0 && reached[i] {
			continue // the users of the nodes are alike
		}
		a, err := r.call(ctx, r.lanes[i].redisKey, "rights")
		switch {
		case err == nil && a.status == statusLacks:
			reason = explanations["NOPERM"] + ": " + a.codes
		case err == nil:
			reached[i] = true
		case !reached[i], isRefusal(err) && strings.HasPrefix(explain(err), explanations["NOPERM"]):
			reason = explain(err)
		}
	}
	h := &r.health
	h.change(r, &h.rights, reason, "this is checked again each second", "the rights of the Redis user suffice, and all parts of the ids are in reach")
}

// Forms of the group in Redis: the layout of its data, and the number of lanes.
const (
	formUnknown = iota // not read yet
	formAgreed         // that of this instance
	formOther
)

// formAgrees returns an error if Redis has, or may have, a group of another form, which no member
// of this one may meet.
func (r *Set) formAgrees() error {
	switch r.form.Load() {
	case formAgreed:
		return nil
	case formOther:
		return errForeign
	}
	return errFormUnknown
}

// layoutBase combines the layout and the number of lanes into one number. Versions without a
// layout read it as a number of lanes.
const layoutBase = 1000

// otherSeenFor is how long an instance that has met another form waits, after the entry of that
// form is gone, before it registers its own. If Redis has only lost the entry, the instances
// of the other form have this time to register theirs first.
const otherSeenFor = 3 * watchEvery

// agreedLanes returns the layout of the group's data and the number of its lanes, combined by
// layoutBase, as its first instance has registered them: this one, if there is no entry.
func (r *Set) agreedLanes(ctx context.Context) (int, error) {
	c := *r.client.Load()
	key := "verve:{" + laneTags[0] + "}:" + r.cfg.Group + ":lanes"
	mine := strconv.Itoa(layout*layoutBase + len(r.lanes))
	if time.Since(r.otherSeen) > otherSeenFor {
		err := c.Do(ctx, c.B().Set().Key(key).Value(mine).Nx().ExSeconds(lanesTTL).Build()).Error()
		if err == nil {
			return layout*layoutBase + len(r.lanes), nil
		}
		if !rueidis.IsRedisNil(err) {
			return 0, err
		}
	}
	agreed, err := c.Do(ctx, c.B().Get().Key(key).Build()).ToString()
	if err != nil {
		return 0, err
	}
	if agreed == mine {
		c.Do(ctx, c.B().Expire().Key(key).Seconds(lanesTTL).Build())
	} else {
		r.otherSeen = time.Now()
	}
	return strconv.Atoi(agreed)
}

// lanesTTL is how many seconds after its last instance has stopped a group may be started
// with another number of lanes.
const lanesTTL = 60
