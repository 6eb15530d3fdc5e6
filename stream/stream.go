// Package stream delivers the count of every sealed epoch to a Kafka topic, a counts file,
// or both.
//
// Its guarantees: once Publish has returned nil the record is on disk; it is delivered to
// every sink, in the order of its sequence number, retried for as long as it takes, and
// visible once, also over kills, restarts and lost acknowledgements. The reasoning is at
// the head of kafka.go.
//
// counter (or the group in dedup/redis) calls Publish, main calls the rest. franz-go is
// used here and nowhere else.
package stream

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"

	"verve/counter"
	"verve/internal/logline"
	"verve/internal/retry"
)

// Config configures a Stream. Group and instance come from the spool.
type Config struct {
	// Scope is ScopeInstance, or ScopeGroup if the ids of the group are counted in one
	// shared store: then the record of a window is the same whichever instance
	// publishes it, and becomes visible once for the whole group.
	Scope Scope

	// Claims decides, in ScopeGroup, which instance writes a line of the counts file.
	// It is required then if there is a counts file.
	Claims Claims

	// Kafka has the topic that records are sent to. Without brokers none are sent.
	Kafka KafkaConfig

	// CountsFile is the path of the counts file, "-" for standard output, empty for none.
	CountsFile string

	// Log gets the failures of the spool and the sinks, sampled. The zero value is
	// silent.
	Log zerolog.Logger

	stdout io.Writer // for tests; nil: os.Stdout
}

// Delivery states of a window.
const (
	StateSpooled   = "spooled"   // on disk; at least one sink has not acknowledged it yet, or never will
	StateDelivered = "delivered" // every sink has acknowledged it
)

// The steps of a record on its way into the sinks. Tests kill the process after each of
// them; kafka.go explains what follows.
const (
	stepBefore    = "before-append"
	stepAppended  = "after-append" // written, neither committed nor synced
	stepSynced    = "after-fsync"
	stepKeys      = "after-keys"    // its keys are acknowledged by the broker, or synced; the record itself is not written
	stepProduced  = "after-produce" // Kafka: acknowledged by the broker, not committed; file: synced
	stepCommitted = "after-commit"
	stepAcked     = "after-ack" // the spool has the acknowledgement
)

const (
	// batchSize is how many records a sink is given at once: a week of minutes
	// in 40 batches, 90 KB each, well below any broker's message limit.
	batchSize = 256

	// batchKeys bounds the keys that the records of a batch have together: 2 MB or so. A
	// record with more keys is a batch of its own.
	batchKeys = 20_000

	// failureLogEvery is how often a failure that repeats is logged.
	failureLogEvery = 30 * time.Second

	// closeWait bounds Close: a client that has requests in flight to a broker
	// that does not answer is left behind.
	closeWait = time.Second
)

// Stream publishes counts. It implements counter.Publisher. One goroutine at a time may
// call Publish or Append; Run is called once; the other methods are safe for concurrent
// use.
type Stream struct {
	cfg   Config
	spool *Spool
	sinks []*worker
	kafka *kafkaSink // the one of sinks that sends to Kafka; nil: no broker

	// testStep, if set, is called at every step constant above.
	testStep atomic.Pointer[func(step string)]
}

var _ counter.Publisher = (*Stream)(nil)

// sink is where records go: Kafka or a file. It is called once at a time.
type sink interface {
	// deliver hands over records in order and returns how many of them, from
	// the front, are durably there, which includes those that turn out to have
	// been there before. It may do less than all without an error. The error is
	// about the record after those. If it is a *poisonError no retry will help that
	// record. Any other error leaves the outcome open: the sink remembers that, and
	// the next call looks for the record before it writes.
	deliver(ctx context.Context, batch []spooled) (n int, err error)
}

// poisonError marks a record that a sink will never accept.
type poisonError struct {
	err    error
	ofKeys bool // Kafka: it was not the record itself that was refused, but one by key
}

func (e *poisonError) Error() string { return e.err.Error() }
func (e *poisonError) Unwrap() error { return e.err }

// New checks the configuration and attaches its sinks to the spool. Nothing is
// dialled or delivered before Run. The caller closes the spool, after Close.
func New(cfg Config, spool *Spool) (*Stream, error) {
	switch {
	case spool == nil:
		return nil, errors.New("stream: no spool")
	case cfg.Scope != ScopeInstance && cfg.Scope != ScopeGroup:
		return nil, fmt.Errorf("stream: scope %q is neither %q nor %q", cfg.Scope, ScopeInstance, ScopeGroup)
	}
	if cfg.Scope == ScopeGroup && cfg.CountsFile != "" && cfg.Claims == nil {
		return nil, errors.New("stream: a counts file of a group needs Claims")
	}
	s := &Stream{cfg: cfg, spool: spool}
	var names []string
	add := func(w *worker) {
		w.stream, w.log.Every = s, failureLogEvery
		s.sinks, names = append(s.sinks, w), append(names, w.name)
	}
	if len(cfg.Kafka.Brokers) > 0 {
		if err := cfg.Kafka.Check(); err != nil {
			return nil, fmt.Errorf("stream: %w", err)
		}
		s.kafka = newKafkaSink(cfg.Kafka, cfg.Log, spool.opened, s.step)
		add(&worker{
			sink: s.kafka, name: "kafka", target: "topic " + cfg.Kafka.Topic + " at " + strings.Join(cfg.Kafka.Brokers, ", "),
			prepare: func(ctx context.Context) error {
				return s.kafka.prepare(ctx, spool.Identity(), cfg.Scope == ScopeGroup)
			},
		})
	}
	if cfg.CountsFile != "" {
		f := newFileSink(cfg.CountsFile, cfg.stdout, spool.opened, s.step)
		f.claims = cfg.Claims
		target := cfg.CountsFile
		if f.stdout != nil {
			target = "standard output"
		}
		add(&worker{sink: f, name: "file", target: target, patience: filePatience})
	}
	if err := spool.attach(names); err != nil {
		return nil, fmt.Errorf("stream: %w", err)
	}
	if pending, _ := spool.watch(); pending > 0 && len(names) == 0 {
		cfg.Log.Warn().Int("records", pending).Msg("no broker and no counts file is set: the records in the spool, and those to come, wait there for a start that has one")
	}
	return s, nil
}

func (s *Stream) step(name string) {
	if hook := s.testStep.Load(); hook != nil {
		(*hook)(name)
	}
}

// Publish makes the record of a sealed epoch durable and returns; Run delivers it. A sink
// delays Publish only while its acknowledgement is written to the file of the spool.
// Publish retries a failing disk and a full spool until ctx ends; meanwhile Stats shows the
// error.
//
// After an error the caller still has to publish the count. If an fsync failed, the record may
// be in the spool nevertheless; Spool.Published shows that to the next process.
func (s *Stream) Publish(ctx context.Context, c counter.Count) error {
	_, err := s.Append(ctx, c)
	return err
}

// Append is Publish, and also returns the place of the record in the spool. Places are
// never reused, and records are delivered in the order of their places: see DeliveredTo.
func (s *Stream) Append(ctx context.Context, c counter.Count) (place uint64, err error) {
	if c.Window%time.Millisecond != 0 {
		return 0, fmt.Errorf("publish %s: window %s is not a whole number of milliseconds", c.Start.UTC().Format(time.RFC3339Nano), c.Window)
	}
	r := Record{
		WindowStart: c.Start.UTC(),
		WindowMS:    c.Window.Milliseconds(),
		Unique:      c.Unique,
		Scope:       s.cfg.Scope,
		Group:       s.spool.group,
		Complete:    c.Complete,
		Exact:       c.Exact,
		// Nothing below a millisecond is of use to a reader.
		SealedAt: c.SealedAt.UTC().Truncate(time.Millisecond),
	}
	if s.cfg.Scope == ScopeInstance {
		r.Instance, r.Seq = s.spool.instance, 1 // the spool gives the real number
	}
	if err := cmp.Or(r.check(), checkKeys(c.Keys)); err != nil {
		return 0, fmt.Errorf("publish: %w", err)
	}
	s.step(stepBefore)
	var wait retry.Backoff
	log := logline.Sampler{Every: failureLogEvery}
	for {
		counter.Rest()
		err := s.spool.append(&r, c.Keys, s.step)
		if err == nil {
			break
		}
		if errors.Is(err, errOutOfOrder) {
			return 0, fmt.Errorf("publish: %w", err)
		}
		log.Msg(s.cfg.Log.Error().Err(err).Str("window_start", r.WindowStart.Format(time.RFC3339Nano)), "record is not in the spool yet, trying again")
		if werr := wait.Sleep(ctx); werr != nil {
			return 0, fmt.Errorf("publish %s: %w (%w)", r.WindowStart.Format(time.RFC3339Nano), err, werr)
		}
	}
	s.step(stepSynced)
	s.cfg.Log.Debug().Str("key", r.Key()).Uint64("unique", r.Unique).Msg("record is in the spool")
	return s.spool.last(), nil // one goroutine appends
}

// Run delivers until ctx ends. The sinks are independent of each other: each has
// its own place in the spool, and a record is removed when all have it.
func (s *Stream) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	for _, w := range s.sinks {
		wg.Go(func() { w.run(ctx) })
	}
	wg.Wait()
	return nil
}

// Flush waits until every record is delivered. It needs Run to be running: stop
// Run after it. When ctx ends first the records stay in the spool and the error
// has their number.
func (s *Stream) Flush(ctx context.Context) error {
	for len(s.sinks) > 0 {
		pending, changed := s.spool.watch()
		if pending == 0 {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			kept := "on disk for the next start"
			if s.spool.dir == "" {
				kept = "in memory only and lost with the process"
			}
			return fmt.Errorf("%d records not delivered, they are %s: %w", pending, kept, ctx.Err())
		}
	}
	return nil
}

// DeliveredTo returns the place up to which every sink has the records, and a
// channel that is closed when a record was appended or delivered since.
func (s *Stream) DeliveredTo() (place uint64, changed <-chan struct{}) {
	s.spool.mu.Lock()
	defer s.spool.mu.Unlock()
	return s.spool.floor(), s.spool.changed
}

// Undelivered returns the places of the records in ScopeGroup, of this group, that
// not every sink has.
func (s *Stream) Undelivered() (map[counter.Span]uint64, error) {
	s.spool.mu.Lock()
	defer s.spool.mu.Unlock()
	spooled := make(map[counter.Span]uint64)
	for after, head := s.spool.head-uint64(s.spool.pending), s.spool.head; after < head; {
		batch, err := s.spool.store.scan(after, head, batchSize)
		if err != nil {
			return nil, fmt.Errorf("read the spool: %w", err)
		}
		if len(batch) == 0 {
			break
		}
		for _, e := range batch {
			if e.record.Scope == ScopeGroup && e.record.Group == s.spool.group {
				spooled[e.record.Span()] = e.index
			}
			after = e.index
		}
	}
	return spooled, nil
}

// Close releases the clients of the broker, after Run has returned. It waits for closeWait
// at most and does not flush.
func (s *Stream) Close() {
	if s.kafka == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), closeWait)
	defer cancel()
	if await(ctx, launch(s.kafka.close)) != nil {
		s.cfg.Log.Warn().Dur("after_ms", closeWait).Msg("the broker's clients did not close in time; the stop continues without them")
	}
}

// Stats is what a Stream knows about itself. The fields are read one after the
// other while records move: together they are not a snapshot of one moment.
type Stats struct {
	Published uint64    // records acknowledged by every sink, since the start
	Pending   int       // records in the spool
	Oldest    time.Time // when the oldest of them was sealed; zero without one
	Conflicts uint64    // keys found with another value: two processes share a name

	DeadLetters int // records that a sink will never take, ever; the file of the spool has them

	// AppendError is why records cannot be made durable right now, empty when
	// they can. While it is set, Publish waits.
	AppendError    string
	AppendFailures uint64 // failed attempts, since the start

	SetAside string      // name of the damaged spool file found at the start
	Sinks    []SinkStats // in the order of their configuration
}

// SinkStats is the state of one sink.
type SinkStats struct {
	Name    string // "kafka" or "file"
	Target  string // the topic and its brokers, the path of the file, or "standard output"
	Failing string // why the last attempt failed, and the next one follows; empty if it did not
}

// Stats returns the current state.
func (s *Stream) Stats() Stats {
	st := Stats{SetAside: s.spool.setAside}
	s.spool.mu.Lock()
	st.Published = s.spool.removed
	st.Pending, st.Oldest, st.DeadLetters = s.spool.pending, s.spool.oldest, s.spool.deadLetters
	st.AppendFailures = s.spool.appendFailures
	if s.spool.appendErr != nil {
		st.AppendError = s.spool.appendErr.Error()
	}
	s.spool.mu.Unlock()
	if s.kafka != nil {
		st.Conflicts = s.kafka.conflicts.Load()
	}
	for _, w := range s.sinks {
		st.Sinks = append(st.Sinks, w.stats())
	}
	return st
}

// launch calls do in a goroutine of its own. The channel is closed when it has returned.
func launch(do func()) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		do()
		close(done)
	}()
	return done
}

// await waits for what was launched. If ctx ends first, that goroutine is left behind, and the
// error is that of ctx.
func await(ctx context.Context, done <-chan struct{}) error {
	select {
	case <-done:
		return nil
	case <-ctx.Done():
	}
	select {
	case <-done: // both at once
		return nil
	default:
		return ctx.Err()
	}
}
