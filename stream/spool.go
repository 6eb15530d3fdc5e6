package stream

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"verve/counter"
	"verve/internal/durable"
)

// SpoolConfig configures a Spool.
type SpoolConfig struct {
	// Dir is the data directory; it is created if missing. Empty: the spool is
	// in memory, and lost with the process, although Publish has returned.
	Dir string
	// Group and Instance name the series of records that this process numbers. An
	// empty Instance means the name that is kept in Dir, or else the host name. The
	// name that was chosen is kept in Dir.
	Group    string
	Instance string // see Group
	// Log gets a line for each loss: a damaged file that was set aside, an earlier copy in
	// place of the last file, counts of keys that are lost. The zero value is silent.
	Log zerolog.Logger
	// Memory is how much the process may use, in bytes; 0: it is not known. Without a Dir
	// 1/memoryKeysShare of it, and memoryKeysLimit at most, is for the keys of records that
	// wait for delivery.
	Memory uint64
}

// Check refuses names that cannot stand in a record's key, and a Dir that cannot
// become a directory. It makes nothing.
func (cfg *SpoolConfig) Check() error {
	if err := checkSettingName("group", cfg.Group); err != nil {
		return err
	}
	if cfg.Instance != "" {
		if err := checkSettingName("instance", cfg.Instance); err != nil {
			return err
		}
	}
	if cfg.Dir == "" {
		return nil
	}
	return checkDir("data-dir", cfg.Dir)
}

const (
	// spoolLimit is two years of one-minute windows, or fourteen hours of
	// the shortest (50 ms), and about half a gigabyte of disk. Above it an append
	// fails: dropping the oldest record would be a silent loss, while a record that
	// is not appended stays in the counter until there is room, and the server is
	// not ready and reports why.
	spoolLimit = 1 << 20

	// memorySpoolLimit is the same without a directory: 45 days of one-minute windows in
	// about 25 MB.
	memorySpoolLimit = 1 << 16

	// spoolFile is the name in the data directory.
	spoolFile = "spool.db"
)

// errSpoolFull and errOutOfOrder are errors of append. After the first Stream.Append tries
// again until there is room. It returns the second at once: a later try would fail as well.
var (
	errSpoolFull  = errors.New("spool is full")
	errOutOfOrder = errors.New("window is older than the last one published")
)

// Spool keeps records that not every sink has acknowledged. It numbers them and
// makes them durable in one transaction, and hands them out in that order.
//
// One process owns the file: a lock refuses a second. All methods are safe for
// concurrent use.
type Spool struct {
	group, instance string
	limit           int    // of pending; a variable for tests
	setAside        string // name of the damaged file, empty if none was found
	log             zerolog.Logger

	// mu serialises changes: the store, the state below and the watchers move
	// together. It is held over an fsync, so nothing on a request path may take
	// it. Reading records does not take it.
	mu     sync.Mutex
	store  store
	files  *keyFiles // of the keys of records; nil: the store is in memory, and so are the keys
	state            // of the store; committed state only
	unmade error     // why there is no file yet: there was no room. The next append tries again
	opened uint64    // head when this process opened the spool

	appendErr      error // why records cannot be made durable now; nil: they can
	appendFailures uint64

	sinks    []string
	sinkless bool      // there is no sink, and records wait for one
	removed  uint64    // records every sink has acknowledged, since the start
	oldest   time.Time // sealed_at of the first pending record
	outdated bool      // the checkpoint is of a later spool than the one that was opened
	changed  chan struct{}

	dir        string     // the data directory; empty: in memory only
	checkpoint checkpoint // the state of this instance's series, in a file of its own

	recent []place // of the last records, recentRecords at most, for Delivered
}

// place is the index of a record and the start of its window.
type place struct {
	start time.Time
	index uint64
}

// recentRecords is how many records Delivered remembers: a day of minutes.
const recentRecords = 1440

// series is the state of one identity's numbering.
type series struct {
	seq               uint64    // last assigned
	counter.Published           // the last appended window
	files             []keyFile // on disk: those whose keys add up to Keys
}

// spooled is a record with its place in the spool. Indexes are never reused, also
// not after the record was removed or the process restarted.
type spooled struct {
	index  uint64
	record Record
	value  []byte            // the record's bytes
	keys   counter.KeyCounts // the counts of its keys; scan leaves them out if they are on disk
	file   keyFile           // the one on disk that has the keys
}

// store is what a Spool needs of the medium. There are two: bbolt and memory.
// Each call is atomic and, on disk, durable when it returns nil. What a call was to store
// may be there although it failed (after a failed fsync that is not known). So every
// write has its own keys in the store, and may be repeated.
type store interface {
	// put stores a record and the state of its series. It calls beforeCommit when
	// everything is written and nothing is committed or synced.
	put(e spooled, identity string, s series, beforeCommit func()) error
	keepInstance(name string) error
	// scan returns up to max entries with after < index <= upTo, in order.
	scan(after, upTo uint64, max int) ([]spooled, error)
	// advance moves a sink's cursor to to, and removes the records with removed < index <=
	// upTo. It returns the files of their keys.
	advance(sink string, to, removed, upTo uint64) ([]keyFile, error)
	// deadLetter keeps a record for good, with the sink that refused it.
	deadLetter(e spooled, sink, reason string) error
	close() error
}

// state is what a store has.
type state struct {
	kept        string            // the name of the instance at the start; empty: none was kept
	series      map[string]series // by identity
	cursors     map[string]uint64 // last index each sink acknowledged
	head        uint64            // index of the last record
	pending     int               // records, the last ones, that not every sink has acknowledged
	deadLetters int               // records that a sink refused for good
	refused     []uint64          // indexes of those that are still pending
	lacking     map[int64]bool    // windows with a record that a sink refused: their starts, Unix nanoseconds
	keysLost    error             // why the sums by key of a series were not known at the start; nil: they were
}

// OpenSpool opens or creates the spool. It renames a damaged file, logs the new
// name, and starts an empty spool in its place: the content cannot be trusted, and
// refusing to start would turn a lost count into an outage. If the disk is full, it
// starts without a file, which append makes when there is room. A file that another
// process uses, that has an unknown format, or that cannot be read or written for a
// reason outside of it is an error.
func OpenSpool(cfg SpoolConfig) (*Spool, error) {
	if err := cfg.Check(); err != nil {
		return nil, err
	}
	s := &Spool{
		group:   cfg.Group,
		log:     cfg.Log,
		dir:     cfg.Dir,
		limit:   memorySpoolLimit,
		store:   newMemoryStore(cfg.Memory),
		state:   state{series: make(map[string]series), cursors: make(map[string]uint64), lacking: make(map[int64]bool)},
		changed: make(chan struct{}),
	}
	if s.dir != "" {
		s.limit = spoolLimit
		err := s.openFile()
		if err != nil && !durable.NoSpace(err) {
			return nil, fmt.Errorf("open spool: %w", err)
		}
		if s.unmade, s.appendErr = err, err; err != nil {
			cfg.Log.Error().Err(err).Msg("there is no room for the spool: counts wait until there is")
		}
		s.checkpoint = readCheckpoint(s.checkpointPath())
	}
	if err := s.load(cfg.Instance); err != nil {
		s.store.close()
		return nil, fmt.Errorf("open spool: %w", err)
	}
	if s.outdated && s.setAside == "" {
		cfg.Log.Error().Str("file", filepath.Join(s.dir, spoolFile)).Uint64("last_seq", s.checkpoint.Seq).
			Msg("spool was taken away or is an earlier copy: records that waited in the last one are not delivered from this one, and seq continues after the last one known")
	}
	if s.kept != "" && s.kept != s.instance {
		cfg.Log.Warn().Str("before", s.kept).Str("instance", s.instance).Int("records", s.pending).
			Msg("the data directory had another --instance: what it left is delivered under its name, each record once")
	}
	return s, nil
}

// openFile opens or creates the file, in place of the store in memory, which has no
// record then: append makes the file first.
func (s *Spool) openFile() error {
	if err := durable.MkdirAll(s.dir); err != nil {
		return err
	}
	files := &keyFiles{dir: filepath.Join(s.dir, keyFilesDir)}
	b, st, aside, err := openBolt(filepath.Join(s.dir, spoolFile), files)
	if aside != "" {
		s.setAside = aside
		s.log.Error().Str("file", filepath.Join(s.dir, spoolFile)).Str("set_aside_as", aside).
			Msg("spool was damaged and set aside, and a new one started: its undelivered records stay in the old file, and seq continues after the last one known")
	}
	if err == nil {
		s.store, s.files, s.state = b, files, st
		files.loaded = true
	}
	return err
}

// makeFile tries again to make the file that there was no room for at the start.
func (s *Spool) makeFile() error {
	if s.unmade == nil {
		return nil
	}
	if s.unmade = s.openFile(); s.unmade != nil {
		return s.unmade
	}
	err := s.load(s.instance)
	if err == nil && s.head > 0 {
		err = errors.New("another process has made one meanwhile")
	}
	if err != nil {
		s.store.close()
		s.store, s.unmade = newMemoryStore(0), err // nothing is appended to it
	}
	return err
}

func (s *Spool) checkpointPath() string { return filepath.Join(s.dir, checkpointFile) }

// load determines the name of the instance, and takes over from the checkpoint what the store
// lacks.
func (s *Spool) load(instance string) (err error) {
	s.opened = s.head
	if s.keysLost != nil {
		s.log.Error().Err(s.keysLost).
			Msg("what was published by key for the last window is not known: the rest of that window, if it is running, is published with exact:false")
	}
	if s.instance = cmp.Or(instance, s.kept, s.checkpoint.Instance); s.instance == "" {
		if s.instance, err = os.Hostname(); err == nil {
			err = checkName("host name", s.instance)
		}
		if err != nil {
			return fmt.Errorf("no instance name: %w", err)
		}
	}
	if s.kept != s.instance {
		if err := s.store.keepInstance(s.instance); err != nil && !durable.NoSpace(err) { // else the checkpoint has it, or the next start keeps it
			return fmt.Errorf("keep the instance name: %w", err)
		}
	}
	if s.checkpoint.Identity != "" && s.checkpoint.Seq > s.series[s.checkpoint.Identity].seq {
		// The spool that had this number was damaged or taken away.
		s.outdated = true
		s.series[s.checkpoint.Identity] = series{seq: s.checkpoint.Seq, Published: counter.Published{
			Last: time.Unix(0, s.checkpoint.Start).UTC(), Unique: s.checkpoint.Unique, KeysLost: s.checkpoint.Keyed,
		}}
	}
	if own := s.series[s.Identity()]; own.seq > 0 {
		s.keepCheckpoint(s.Identity(), own)
	}
	if err := s.refreshOldest(); err != nil {
		return err
	}
	tail, err := s.store.scan(s.head-min(s.head, recentRecords), s.head, recentRecords)
	if err != nil {
		return err
	}
	for _, e := range tail {
		s.remember(e.record.WindowStart, e.index)
	}
	return nil
}

// Instance is the name in use.
func (s *Spool) Instance() string { return s.instance }

// Published returns, by the name of the series, the start of the last window that a
// record was appended for, and the sum of unique over the records of that window. A
// process that restarts within a window, or does not know whether a count reached the
// spool before it was killed, publishes the difference. Other instances and groups may
// have used the directory before.
//
// The sums by key are in the spool only, as the checkpoint has no room for them. If the spool
// or one of its files was lost and some of the window's records had keys, KeysLost is set: then
// the difference of each key is not known, so the keys of the rest of the window cannot be
// right, and it is published with exact:false. Keys then has a part of the sums, or none.
func (s *Spool) Published() map[string]counter.Published {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := map[string]counter.Published{}
	for identity, last := range s.series {
		all[identity] = last.Published
	}
	return all
}

// Identity is the name of this instance's series.
func (s *Spool) Identity() string { return s.group + "/" + s.instance }

// Close closes the file. Pending records stay in it.
func (s *Spool) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.store.close()
}

// append numbers the record and makes it durable. After an error the record is not
// appended: the next append has the same number and the same place. So it also
// overwrites a record that was stored although the disk reported an error.
func (s *Spool) append(r *Record, keys counter.KeyCounts, step func(string)) (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer func() {
		if s.appendErr = err; err != nil {
			s.appendFailures++
		}
	}()
	identity := r.identity()
	before := s.series[identity]
	next := before
	if r.Scope == ScopeInstance {
		// Labels of an instance strictly increase, except that a process which was
		// restarted within a window publishes a second record for it.
		if r.WindowStart.Before(next.Last) {
			return fmt.Errorf("%w: %s after %s", errOutOfOrder, r.WindowStart.UTC().Format(time.RFC3339Nano), next.Last.Format(time.RFC3339Nano))
		}
		next.seq++
		r.Seq = next.seq
	}
	if err := s.makeFile(); err != nil {
		return fmt.Errorf("append to the spool: %w", err)
	}
	if s.pending >= s.limit {
		return fmt.Errorf("%w: %d records wait for delivery", errSpoolFull, s.pending)
	}
	r.Keys = uint64(keys.Len())
	value, err := r.appendJSON(nil)
	if err != nil {
		return err
	}
	e := spooled{index: s.head + 1, record: *r, value: value, keys: keys}
	if !r.WindowStart.Equal(next.Last) {
		next = series{seq: next.seq, Published: counter.Published{Last: r.WindowStart.UTC(), Unique: r.Unique, Keys: keys}}
	} else {
		next.Unique += r.Unique
		next.Keys = counter.SumKeys(next.Keys, keys)
	}
	if keys.Len() > 0 && s.files != nil {
		if e.file, err = s.files.write(e.index, keys); err != nil {
			return fmt.Errorf("append to the spool: %w", err)
		}
		if !next.KeysLost {
			next.files = append(slices.Clone(next.files), e.file)
		}
	}
	if err := s.store.put(e, identity, next, func() { step(stepAppended) }); err != nil {
		return fmt.Errorf("append to the spool: %w", err)
	}
	counter.Rest()
	s.series[identity] = next
	if r.Scope == ScopeInstance {
		s.keepCheckpoint(identity, next)
	}
	s.head = e.index
	s.pending++
	s.release(before.files)
	if s.pending == 1 {
		s.oldest = r.SealedAt
	}
	s.remember(r.WindowStart, e.index)
	if len(s.sinks) == 0 && !s.sinkless {
		// Nothing to deliver to: the record's own log line is all there is. If it cannot be
		// removed now, it is removed with the next record.
		_ = s.commitCursor("")
	}
	s.broadcast()
	return nil
}

// release removes the files of keys that nothing refers to any more.
func (s *Spool) release(files []keyFile) {
	for _, f := range files {
		used := f.index > s.head-uint64(s.pending)
		for _, last := range s.series {
			used = used || slices.Contains(last.files, f)
		}
		if !used {
			s.files.remove(f)
		}
	}
}

// keepCheckpoint writes the checkpoint of a series. If that fails, it matters only if the spool
// is damaged as well. So it is not tried again: the next append writes a newer one.
func (s *Spool) keepCheckpoint(identity string, at series) {
	if s.dir == "" || s.checkpoint.Identity == identity && s.checkpoint.Seq == at.seq {
		return
	}
	s.checkpoint = checkpoint{
		Identity: identity, Instance: s.instance,
		Seq: at.seq, Start: at.Last.UnixNano(), Unique: at.Unique, Keyed: at.Keys.Len() > 0 || at.KeysLost,
	}
	_ = s.checkpoint.write(s.checkpointPath())
}

func (s *Spool) remember(start time.Time, index uint64) {
	s.recent = append(s.recent[max(0, len(s.recent)+1-recentRecords):], place{start, index})
}

// attach names the sinks that have to acknowledge a record before it is
// removed. Records do not wait for a sink that is no longer configured. A sink that comes
// back gets the records that are still there and that it has not acknowledged. Without any
// sink a record is removed when it is appended. But if records were there at the start, these
// had a sink: then they and all new ones wait for a start that has one.
func (s *Spool) attach(sinks []string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sinks = sinks
	s.sinkless = len(sinks) == 0 && s.pending > 0
	for _, name := range sinks {
		if _, known := s.cursors[name]; !known {
			// Without this a start without the sink would not know that records wait for it.
			s.cursors[name] = s.head - uint64(s.pending)
			_ = s.commitCursor(name) // else the first acknowledgement does
		}
	}
	if s.pending == 0 || len(sinks) == 0 {
		return nil
	}
	for name, at := range s.cursors {
		if waits := min(s.head-at, uint64(s.pending)); waits > 0 && !slices.Contains(sinks, name) {
			s.log.Warn().Str("sink", name).Uint64("records", waits).
				Msg("records have waited for a sink that is not set now: those that are set get them, and if it is set again it lacks what they have got")
		}
	}
	if err := s.commitCursor(sinks[0]); err != nil && !durable.NoSpace(err) { // else the next acknowledgement does
		return err
	}
	return nil
}

// floor is the index up to which every sink has acknowledged.
func (s *Spool) floor() uint64 {
	low := s.head // without a sink nothing waits
	for _, name := range s.sinks {
		low = min(low, s.cursors[name])
	}
	return low
}

// commitCursor writes a sink's cursor, if there is one, and removes what every sink has acknowledged.
func (s *Spool) commitCursor(sink string) error {
	floor, removed := s.floor(), s.head-uint64(s.pending)
	files, err := s.store.advance(sink, s.cursors[sink], removed, floor)
	if err != nil {
		return err
	}
	if floor > removed {
		s.pending = int(s.head - floor)
		dead := len(s.refused)
		s.refused = slices.DeleteFunc(s.refused, func(index uint64) bool { return index <= floor })
		s.removed += floor - removed - uint64(dead-len(s.refused)) // a sink lacks those
	}
	s.release(files)
	return s.refreshOldest()
}

func (s *Spool) refreshOldest() error {
	s.oldest = time.Time{}
	if s.pending == 0 {
		return nil
	}
	first, err := s.store.scan(s.head-uint64(s.pending), s.head, 1)
	if err == nil && len(first) > 0 {
		s.oldest = first[0].record.SealedAt
	}
	return err
}

// next returns records that the sink has not acknowledged, oldest first, with their keys:
// limit records at most, and after the first one only as long as all have keyLimit keys or
// fewer together. It returns appended records only: one whose append failed may be in the file,
// and be overwritten later.
func (s *Spool) next(sink string, limit int, keyLimit uint64) ([]spooled, error) {
	s.mu.Lock()
	after, upTo, st, files := s.cursors[sink], s.head, s.store, s.files
	s.mu.Unlock()
	if after >= upTo {
		return nil, nil
	}
	batch, err := st.scan(after, upTo, limit)
	if err != nil {
		return nil, err
	}
	keys := uint64(0)
	for i := range batch {
		e := &batch[i]
		if keys += e.record.Keys; i > 0 && keys > keyLimit {
			return batch[:i], nil
		}
		if e.file.index > 0 {
			if e.keys, err = files.read(e.file); err != nil {
				return nil, err
			}
		}
	}
	return batch, nil
}

// ack moves the sink's cursor. It moves in memory even if the disk fails, so that
// this process does not deliver twice. After an error the caller tries again; a process that
// is started before that succeeds looks for the records in the sink.
func (s *Spool) ack(sink string, to uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cursors[sink] = max(s.cursors[sink], to)
	defer s.broadcast()
	return s.commitCursor(sink)
}

// deadLetter keeps a record that a sink will never take.
func (s *Spool) deadLetter(sink string, e spooled, reason string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.store.deadLetter(e, sink, reason); err != nil {
		return err
	}
	s.lacking[e.record.WindowStart.UnixNano()] = true
	if !slices.Contains(s.refused, e.index) { // by another sink, or before a restart
		s.refused = append(s.refused, e.index)
		s.deadLetters++
	}
	return nil
}

// broadcast wakes every goroutine that waits on watch. mu is held.
func (s *Spool) broadcast() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// watch returns the number of pending records and a channel that is closed at
// the next change after it was counted.
func (s *Spool) watch() (pending int, changed <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pending, s.changed
}

// last returns the index of the last record.
func (s *Spool) last() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.head
}

// Delivered returns StateSpooled or StateDelivered for a window that has one of the last
// recentRecords records, and an empty string for any other. A window with a record that a sink
// refused for good is never delivered: that sink lacks its count.
func (s *Spool) Delivered(windowStart time.Time) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lacking[windowStart.UnixNano()] {
		return StateSpooled
	}
	for _, p := range slices.Backward(s.recent) {
		switch {
		case !p.start.Equal(windowStart):
		case p.index <= s.floor():
			return StateDelivered
		default:
			return StateSpooled
		}
	}
	return ""
}
