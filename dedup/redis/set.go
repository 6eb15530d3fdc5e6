// Package redis is the set of ids that the instances of a group share, and the group:
// which of its windows are open, when one is sealed, and which instance publishes it.
//
// It guarantees that an id is Unique once in the whole group, and that a window has
// one record, whichever instance publishes it. DESIGN.md, "Many instances: Redis",
// has the protocol; lane.lua is its part in Redis.
//
// server adds ids to a Set, package counter reports epochs to a Group as its
// Publisher, and the Group hands the records of the group to package stream.
package redis

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/maphash"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/redis/rueidis"
	"github.com/rs/zerolog"

	"verve/counter"
	"verve/dedup"
	"verve/internal/setting"
)

// Defaults of Config.
const (
	// defaultTimeout lets a request that fails be answered within 250 ms.
	defaultTimeout = 200 * time.Millisecond

	// defaultPending is more than the connections of an instance, so that
	// only a flood of pipelined requests reaches it. 20 MB.
	defaultPending = 1 << 17

	// defaultMaxSkew is far more than clocks that are kept by NTP differ.
	defaultMaxSkew = 2 * time.Second

	// defaultLogBytes holds the ids of some 16 million answers.
	defaultLogBytes = 256 << 20
)

// Config configures a Set. The zero value of an optional field is its
// default.
type Config struct {
	// URLs of one server, of two or more nodes of a cluster, or of Sentinels:
	// redis://USER:PASSWORD@HOST:PORT/DB, rediss:// for TLS, unix:///SOCKET, and
	// redis-sentinel://HOST:PORT?master_set=NAME (or rediss-sentinel). If there are
	// several, all but hosts and ports are those of the first.
	URLs []string

	// SentinelUser and SentinelPassword are for the Sentinels. If both are empty, those
	// of the master are used.
	SentinelUser, SentinelPassword string

	Group    string        // instances with one name count together
	Instance string        // shown to other instances, each has another one; optional
	Window   time.Duration // length of an epoch

	// MaxSkew is how far the clocks of instances may differ. That long after the end of
	// an epoch its record waits for instances that have not left it. 0: defaultMaxSkew.
	MaxSkew time.Duration

	// Local has the ids that this process has answered, so that a repeat needs no
	// trip to Redis. With FailOpen it answers while Redis is down. It must keep
	// nothing on disk. Close closes it.
	Local *dedup.Memory

	// FailOpen lets Local answer while Redis is unreachable. Otherwise ids that Local
	// does not have get ErrUnavailable.
	FailOpen bool

	MaxIDs  uint64        // ids an epoch of the whole group may hold, 0: no limit. May be exceeded by the ids in flight.
	MaxKeys int           // keys an epoch may have, in each lane and by each instance; 0: counter.DefaultMaxKeys
	Timeout time.Duration // longest wait of an id; 0: defaultTimeout

	// File is the path of a file that keeps, over a restart, how many ids were answered
	// in the windows that are not published. Empty: there is none.
	File string

	Log zerolog.Logger // what fails and when it works again, sampled

	session  string // unique among all processes that ever ran
	pending  int    // ids that may wait for an answer at once; more get ErrUnavailable
	logBytes int64  // memory for the ids that would have to be added again after a loss
}

// Set is the dedup.Set that the instances of a group share: an id is Unique once in
// all of them. DESIGN.md, "Many instances: Redis", has the protocol.
//
// Its goroutines run from New to Close. All methods but Close are safe for concurrent use,
// within the rule that dedup.Set has for AddMany.
type Set struct {
	cfg     Config
	option  rueidis.ClientOption
	hashKey [2]uint64    // of the hash that chooses lanes
	seed    maphash.Seed // of keys, in an epoch's Keys

	client atomic.Pointer[rueidis.Client] // nil until the first connection is made

	otherSeen time.Time    // when others of another form were met last; watch alone uses it
	form      atomic.Int32 // of the group in Redis

	lanes  []lane // clusterLanes or serverLanes of them
	shift  int    // of a hash, to the number of its lane
	ledger *Ledger

	mu     sync.Mutex
	epochs []*redisEpoch // opened and not retired, oldest first
	latest atomic.Pointer[redisEpoch]

	now      atomic.Int64 // ns since start, a tick old at most
	start    time.Time
	pending  atomic.Int64 // ids waiting for an answer
	logBytes atomic.Int64

	health  health
	counts  redisCounts
	closing chan struct{}
	life    context.Context // ends when Close gives up waiting
	end     context.CancelFunc
	running sync.WaitGroup
}

// redisCounts are for the metrics.
type redisCounts struct {
	batches, retries, takenBack, twice, restored, dropped, fulls atomic.Uint64
}

// redisEpoch is the state of an epoch in this process.
type redisEpoch struct {
	set           *Set
	start         time.Time
	name          string                     // in Redis: see epochName
	before, after string                     // the names of the windows directly before and after it
	previous      atomic.Pointer[redisEpoch] // opened before this one; nil once this one is retired
	end           int64                      // when the epoch is due to end, in ns since the start of the Set
	view          *dedup.View                // in Local
	lanes         []laneEpoch

	opened time.Time
	group  *ledgerEpoch // what the ledger has of it
}

// Check returns an error that names the setting for a Config that can never work. It makes
// no connection.
func (cfg *Config) Check() error {
	if _, err := redisOption(cfg); err != nil {
		return err
	}
	if cfg.Group == "" {
		return setting.Errorf("group", "want a name")
	}
	if err := counter.CheckWindow(cfg.Window); err != nil {
		return setting.Errorf("window", "%v", err)
	}
	return setting.CheckTimeout("max-clock-skew", cfg.MaxSkew)
}

// newSession makes a name that no other process has. Its first 8 characters are a digest of the
// instance's name, by which lane.lua finds the earlier sessions of the same instance.
func newSession(instance string) string {
	if instance == "" {
		return rand.Text()
	}
	sum := sha256.Sum256([]byte(instance))
	return fmt.Sprintf("%x", sum[:4]) + rand.Text()
}

// New checks cfg and starts the goroutines of the Set, which connect to Redis. An error means
// that cfg is wrong; a Redis that is down is none.
func New(cfg Config) (*Set, error) {
	if err := cfg.Check(); err != nil {
		return nil, fmt.Errorf("redis: %w", err)
	}
	option, _ := redisOption(&cfg) // checked
	switch {
	case cfg.Local == nil:
		return nil, errors.New("redis: Local is required")
	case cfg.Timeout < 0:
		return nil, errors.New("redis: Timeout must not be negative")
	}
	cfg.session = cmp.Or(cfg.session, newSession(cfg.Instance))
	cfg.MaxSkew = cmp.Or(cfg.MaxSkew, defaultMaxSkew)
	cfg.Timeout = cmp.Or(cfg.Timeout, defaultTimeout)
	cfg.MaxKeys = cmp.Or(cfg.MaxKeys, counter.DefaultMaxKeys)
	cfg.pending = cmp.Or(cfg.pending, defaultPending)
	cfg.logBytes = cmp.Or(cfg.logBytes, defaultLogBytes)
	r := &Set{
		cfg: cfg, option: option, hashKey: hashKey(cfg.Group), seed: maphash.MakeSeed(),
		start: time.Now(), closing: make(chan struct{}),
	}
	r.life, r.end = context.WithCancel(context.Background())
	n := serverLanes
	if len(option.InitAddress) > 1 && option.Sentinel.MasterSet == "" {
		n = clusterLanes
	}
	r.lanes, r.shift = make([]lane, n), 64-bits.TrailingZeros(uint(n))
	for i := range r.lanes {
		r.lanes[i].init(r, i)
	}
	r.ledger = openLedger(cfg, cfg.Instance+"/"+cfg.session, r)
	r.running.Go(r.connect)
	r.running.Go(r.sweep)
	r.running.Go(func() { r.ledger.run(r.life, r.closing) })
	r.running.Go(func() { r.ledger.keepAll(r.closing) })
	return r, nil
}

const (
	// replyTimeout is the longest wait for a reply; then the connection is given up.
	// Requests are answered long before: the reply shows whether the batch was done.
	replyTimeout = time.Second
	dialTimeout  = time.Second

	// registerWait is how long the first ids of an epoch wait until the epoch is in
	// the ledger. One exchange with Redis takes a fraction of that.
	registerWait = 50 * time.Millisecond

	// tick is the precision of the waiting time of an id.
	tick = 5 * time.Millisecond

	// closeWait bounds how long Close waits for the outcome of batches under way.
	closeWait = time.Second
)

// connect makes the client, then starts the lanes and watches the health of
// the servers.
func (r *Set) connect() {
	wait := 20 * time.Millisecond
	for {
		client, err := rueidis.NewClient(r.option)
		r.ledger.noteAbsence(errors.Is(err, syscall.ECONNREFUSED) && len(r.option.InitAddress) == 1 && r.option.Sentinel.MasterSet == "")
		if err == nil {
			r.client.Store(&client)
			break
		}
		r.health.failed(r, err)
		for i := range r.lanes {
			r.lanes[i].noteFailure()
		}
		select {
		case <-r.closing:
			return
		case <-time.After(wait):
		}
		wait = min(2*wait, time.Second)
	}
	r.checkConfig() // before the first id is sent
	for i := range r.lanes {
		r.running.Go(r.lanes[i].run)
	}
	r.watch()
}

// conn returns the client, or an error until the first connection is made.
func (r *Set) conn() (rueidis.Client, error) {
	if c := r.client.Load(); c != nil {
		return *c, nil
	}
	return nil, r.unavailable()
}

// unavailable returns ErrUnavailable, with the reason if it is known.
func (r *Set) unavailable() error {
	r.health.mu.Lock()
	reason := cmp.Or(r.health.misconfigured, r.health.rights, r.health.failure)
	r.health.mu.Unlock()
	if reason != "" {
		return fmt.Errorf("%w: %s", dedup.ErrUnavailable, reason)
	}
	return errLate
}

// Open implements Set.
func (r *Set) Open(e *counter.Epoch) counter.State {
	s := &redisEpoch{
		set:    r,
		opened: time.Now(),
		start:  e.Start(),
		name:   epochName(counter.Span{Start: e.Start(), Window: e.Window()}),
		before: epochName(counter.Span{Start: e.Start().Add(-e.Window()), Window: e.Window()}),
		after:  epochName(counter.Span{Start: e.Start().Add(e.Window()), Window: e.Window()}),
		end:    int64(e.End().Sub(r.start)),
		lanes:  make([]laneEpoch, len(r.lanes)),
	}
	for i := range r.lanes {
		l := &r.lanes[i]
		l.mu.Lock()
		s.lanes[i].base = l.seq + 1 // this batch may be under way
		l.mu.Unlock()
	}
	s.view = r.cfg.Local.Open(e).(*dedup.View)
	s.group = r.ledger.Opened(counter.Span{Start: s.start, Window: e.Window()}, e.Unique, e.Exact())
	r.mu.Lock()
	defer r.mu.Unlock()
	r.epochs = append(r.epochs, s)
	last := r.latest.Swap(s)
	s.previous.Store(last)
	if last != nil && last.end == int64(s.start.Sub(r.start)) {
		s.before = last.name // also after a change of --window
	} else {
		e.FollowsWindow()
	}
	return s
}

// await waits, before the first id of an epoch is answered, for a moment until the epoch is in
// the ledger: from then on it is published, whatever becomes of this process. If the ledger is
// unreachable, perhaps in a failed part of the cluster, ids are answered anyway, once this
// process has noted the epoch on its disk. The next heartbeat that succeeds writes the epoch
// into the ledger. await returns an error if the group does not accept the epoch, or has not
// answered this process yet: its --window may differ from that of the group.
func (r *Set) await(s *redisEpoch) error {
	if s.group.isRegistered() {
		return nil
	}
	t := time.NewTimer(time.Until(s.opened.Add(registerWait)))
	defer t.Stop()
	select {
	case <-s.group.registered:
		return nil
	case <-t.C:
	case <-r.life.Done():
	}
	if s.group.refused.Load() || r.ledger.standing.Load() != inside {
		return fmt.Errorf("%w: the group has not accepted the window of this instance", dedup.ErrUnavailable)
	}
	t.Reset(replyTimeout)
	select {
	case <-s.group.registered:
		return nil
	case <-s.group.kept:
		return nil
	case <-t.C:
	case <-r.life.Done():
	}
	return errNotKept
}

// Ledger returns the ledger of the group.
func (r *Set) Ledger() *Ledger { return r.ledger }

// Retire implements counter.State.
func (s *redisEpoch) Retire() {
	r := s.set
	r.mu.Lock()
	r.epochs = slices.DeleteFunc(r.epochs, func(x *redisEpoch) bool { return x == s })
	r.mu.Unlock()
	unsent := 0
	for i := range r.lanes {
		unsent += r.lanes[i].retire(s)
	}
	s.previous.Store(nil)
	if unsent > 0 {
		r.counts.dropped.Add(uint64(unsent))
		r.cfg.Log.Error().Str("window_start", s.start.Format(time.RFC3339Nano)).Int("ids", unsent).
			Msg("the window was sealed without ids that were answered ok and that Redis lacked")
	}
	s.view.Retire()
}

// Keys implements Set.
func (r *Set) Keys(items []dedup.Item) { r.cfg.Local.Keys(items) }

// AddMany implements dedup.Set. Ids of one lane travel to Redis together, up to the size of
// a batch. It returns when every id has its verdict: an id waits for Config.Timeout at most.
func (r *Set) AddMany(e *counter.Epoch, items []dedup.Item, verdicts []dedup.Verdict) (err error) {
	s := e.State.(*redisEpoch)
	w := waits.Get().(*waiting)
	defer waits.Put(w)
	judged := func(i int, v dedup.Verdict, cause error, m *named) {
		if cause != nil {
			if v = dedup.Refusal(cause); v == dedup.Full {
				r.counts.fulls.Add(1)
			}
			err = cmp.Or(err, cause)
		}
		verdicts[i] = v
		if v == dedup.Unique {
			r.countUnder(e, m)
		}
	}
	for i := range items {
		o := items[i].Options
		if (o == nil || len(o.Token) == 0) && r.cfg.Local.Knows(s.view, items[i].Key) {
			verdicts[i] = dedup.Repeat
			continue
		}
		full := o != nil && !r.hasRoom(e, o.Under)
		if full && len(o.Token) == 0 {
			judged(i, 0, dedup.ErrTooManyKeys, nil)
			continue
		}
		var en encoded
		h, m := r.name(&en, &items[i], full)
		l := &r.lanes[h>>r.shift]
		v, a, cause := l.add(e, s, items[i].Key, &en, m)
		if a != nil {
			a.item = i
			w.asks = append(w.asks, a)
			if a.enough {
				w.lanes |= 1 << l.i
			}
			continue
		}
		judged(i, v, cause, m)
	}
	for i := range r.lanes {
		if w.lanes&(1<<i) != 0 {
			nudge(r.lanes[i].wake) // only now, so that a batch takes all of them
		}
	}
	for _, a := range w.asks {
		<-a.done
		judged(a.item, a.verdict, a.err, a.named)
		a.of, a.named, a.e, a.err = nil, nil, nil, nil
		asks.Put(a)
	}
	clear(w.asks)
	w.asks, w.lanes = w.asks[:0], 0
	return err
}

// name encodes an id, with the key and the token that its request named. full: see named.
func (r *Set) name(en *encoded, item *dedup.Item, full bool) (hash uint64, m *named) {
	o := item.Options
	if o != nil && len(o.Under) > 0 {
		hash = en.encodeUnder(r.hashKey, o.Under, item.ID)
	} else {
		hash = en.encode(r.hashKey, item.Key.IsDecimal(), item.ID)
	}
	if o != nil && len(o.Under)+len(o.Token) > 0 {
		m = newNamed(r.hashKey, en, o, full)
	}
	return hash, m
}

func (r *Set) keyHash(under []byte) uint64 { return maphash.Bytes(r.seed, under) }

// waiting has the ids of a call of AddMany that wait for their outcome.
type waiting struct {
	asks  []*ask
	lanes uint32 // a bit for each lane that got one
}

var waits = sync.Pool{New: func() any { return new(waiting) }}

// Run implements Set: it runs Local's cleaner. The rest runs without it.
func (r *Set) Run(ctx context.Context) error {
	return r.cfg.Local.Run(ctx)
}

// Stats implements Set.
func (r *Set) Stats() dedup.Stats {
	s := r.cfg.Local.Stats()
	s.Fit, s.Estimated = r.cfg.MaxIDs, false // the memory of Redis is not known here
	s.Full += r.counts.fulls.Load()
	if ready, reason := r.Health(); !ready {
		s.Problem = reason
	} else if s.Problem == "" {
		s.Problem = r.ledger.Stats().Problem
	}
	return s
}

// Live returns the number of unique ids of the whole group in the epoch that begins at start, as
// of the last reply from each lane; 0 if that is not open here.
func (r *Set) Live(start time.Time) uint64 {
	for _, s := range r.opened() {
		if s.start.Equal(start) {
			return s.live()
		}
	}
	return 0
}

func (s *redisEpoch) live() (n uint64) {
	for i := range s.lanes {
		n += s.lanes[i].n.Load()
	}
	return n
}

// Group returns a snapshot for the metrics.
func (r *Set) Group() dedup.GroupStats {
	s := dedup.GroupStats{
		LedgerStats: r.ledger.Stats(),
		Batches:     r.counts.batches.Load(),
		Retries:     r.counts.retries.Load(),
		TakenBack:   r.counts.takenBack.Load(),
		Twice:       r.counts.twice.Load(),
		Restored:    r.counts.restored.Load(),
		Dropped:     r.counts.dropped.Load(),
		Pending:     uint64(max(0, r.pending.Load())),
	}
	if e := r.latest.Load(); e != nil {
		s.Start, s.Unique = e.start, e.live()
	}
	s.Ready, s.Away = r.Health()
	return s
}

// Close waits until every batch under way is done, for closeWait at most, and ends the doubts of
// this session in Redis. Requests get ErrUnavailable from then on. It returns the error of
// closing Local. It must be called once: a second call panics.
func (r *Set) Close() error {
	close(r.closing)
	give := time.AfterFunc(closeWait, r.end)
	r.running.Wait()
	give.Stop()
	r.end()
	if c := r.client.Load(); c != nil {
		(*c).Close()
	}
	for i := range r.lanes {
		r.lanes[i].refuseAll()
	}
	return r.cfg.Local.Close()
}

// sweep ends the waiting of requests whose time is over.
func (r *Set) sweep() {
	t := time.NewTicker(tick)
	defer t.Stop()
	for {
		select {
		case <-r.closing:
			return
		case <-t.C:
		}
		now := int64(time.Since(r.start))
		r.now.Store(now)
		for i := range r.lanes {
			r.lanes[i].expire(now)
		}
	}
}
