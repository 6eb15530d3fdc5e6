package stream

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	bolt "go.etcd.io/bbolt"

	"verve/counter"
	"verve/internal/testproc"
)

func noStep(string) {}

func record(i int) Record {
	w := window(i)
	return Record{
		WindowStart: w.Start, WindowMS: w.Window.Milliseconds(), Unique: w.Unique, Scope: ScopeInstance,
		Group: "verve", Instance: "host-1", Complete: true, Exact: true, SealedAt: w.SealedAt.Truncate(time.Millisecond),
	}
}

func appendTo(t *testing.T, sp *Spool, from, to int) {
	t.Helper()
	for i := from; i < to; i++ {
		r := record(i)
		if err := sp.append(&r, counter.KeyCounts{}, noStep); err != nil {
			t.Fatal(err)
		}
	}
}

func drain(t *testing.T, sp *Spool, sink string) []Record {
	t.Helper()
	var out []Record
	for {
		batch, err := sp.next(sink, batchSize, batchKeys)
		if err != nil {
			t.Fatal(err)
		}
		if len(batch) == 0 {
			return out
		}
		for _, e := range batch {
			out = append(out, e.record)
		}
		if err := sp.ack(sink, batch[len(batch)-1].index); err != nil {
			t.Fatal(err)
		}
	}
}

func TestSpoolHandsOutInOrderAndForgetsWhatAllSinksHave(t *testing.T) {
	for name, dir := range map[string]string{"disk": t.TempDir(), "memory": ""} {
		t.Run(name, func(t *testing.T) {
			sp := testSpool(t, dir)
			defer sp.Close()
			if err := sp.attach([]string{"a", "b"}); err != nil {
				t.Fatal(err)
			}
			appendTo(t, sp, 0, 600) // more than two batches
			wantWindows(t, drain(t, sp, "a"), 600)
			if pending, _ := sp.watch(); pending != 600 {
				t.Errorf("%d pending while b has none, want 600", pending)
			}
			wantWindows(t, drain(t, sp, "b"), 600)
			if pending, _ := sp.watch(); pending != 0 || !sp.oldest.IsZero() {
				t.Errorf("%d pending, oldest %s", pending, sp.oldest)
			}
			if left, err := sp.store.scan(0, 1<<62, 10); len(left) != 0 || err != nil {
				t.Errorf("%d records left, %v", len(left), err)
			}
			appendTo(t, sp, 600, 601)
			if got := drain(t, sp, "a"); len(got) != 1 || got[0].Seq != 601 {
				t.Errorf("after an empty spool: %+v", got)
			}
		})
	}
}

// TestRecordsWaitForASinkThatWasTakenAway, and so do those that follow. Without any
// sink before, nothing waits.
func TestRecordsWaitForASinkThatWasTakenAway(t *testing.T) {
	dir := t.TempDir()
	for _, tt := range []struct {
		sinks   []string
		from    int
		pending int
	}{{nil, 0, 0}, {[]string{"a"}, 2, 2}, {nil, 4, 4}, {nil, 6, 6}, {[]string{"a"}, 8, 8}} {
		sp := testSpool(t, dir)
		if err := sp.attach(tt.sinks); err != nil {
			t.Fatal(err)
		}
		appendTo(t, sp, tt.from, tt.from+2)
		if got, _ := sp.watch(); got != tt.pending {
			t.Errorf("sinks %v: %d records wait, want %d", tt.sinks, got, tt.pending)
		}
		if tt.from == 8 {
			if got := drain(t, sp, "a"); len(got) != 8 || !got[0].WindowStart.Equal(window(2).Start) {
				t.Errorf("the sink was given %d records, want the 8 since the first that waited: %v", len(got), got)
			}
		}
		sp.Close()
	}
}

// TestASinkThatIsReplacedWhileRecordsWaitIsNamed: the other one gets them, also if the first one
// has never had a record.
func TestASinkThatIsReplacedWhileRecordsWaitIsNamed(t *testing.T) {
	dir := t.TempDir()
	for i, tt := range []struct {
		sinks []string
		acked uint64 // by the first of them
		want  string // in the log
	}{
		{[]string{"kafka"}, 0, ""},                           // 1 to 3 wait
		{[]string{"kafka"}, 0, ""},                           // 1 to 6
		{[]string{"file"}, 9, `"sink":"kafka","records":6`},  // it has all
		{[]string{"kafka"}, 11, ""},                          // 12 waits
		{[]string{"file", "kafka"}, 15, ""},                  // 12 to 15 for kafka
		{[]string{"file"}, 18, `"sink":"kafka","records":4`}, // it had 12 to 15
		{[]string{"file", "kafka"}, 21, ""},                  // 19 to 21 for kafka
		{nil, 0, ""},                                         // all wait
		{[]string{"kafka", "file"}, 24, ""},
	} {
		var log testproc.Buffer
		sp, err := OpenSpool(SpoolConfig{Dir: dir, Group: "verve", Instance: "host-1", Log: zerolog.New(&log)})
		if err != nil {
			t.Fatal(err)
		}
		if err := sp.attach(tt.sinks); err != nil {
			t.Fatal(err)
		}
		appendTo(t, sp, 3*i, 3*i+3)
		if tt.acked > 0 {
			if err := sp.ack(tt.sinks[0], tt.acked); err != nil {
				t.Fatal(err)
			}
		}
		sp.Close()
		if got := log.String(); (got == "") != (tt.want == "") || !strings.Contains(got, tt.want) {
			t.Errorf("start %d: the log is %q, want %q in it", i, got, tt.want)
		}
	}
}

func TestSpoolNumbersWithoutGapsAcrossRestarts(t *testing.T) {
	dir := t.TempDir()
	var got []Record
	for i := range 5 {
		sp := testSpool(t, dir)
		if err := sp.attach([]string{"a"}); err != nil {
			t.Fatal(err)
		}
		at, _ := lastWindow(sp)
		if i > 0 && !at.Equal(window(2*i-1).Start) {
			t.Errorf("last window %s after %d records", at, 2*i)
		}
		appendTo(t, sp, 2*i, 2*i+2)
		if i%2 == 0 { // every other run delivers
			got = append(got, drain(t, sp, "a")...)
		}
		sp.Close()
	}
	wantWindows(t, got, 10)
}

func TestSpoolKeepsAWeekOfMinutes(t *testing.T) {
	if testing.Short() {
		t.Skip("10,080 synced transactions")
	}
	t.Parallel()
	dir := t.TempDir()
	sp := testSpool(t, dir)
	// The test is about keeping records; 10,080 single syncs would take longer than the
	// rest of the package together.
	sp.store.(*boltStore).db.NoSync, sp.dir = true, ""
	if err := sp.attach([]string{"a"}); err != nil {
		t.Fatal(err)
	}
	appendTo(t, sp, 0, 7*24*60)
	sp.Close()
	sp = testSpool(t, dir)
	defer sp.Close()
	sp.store.(*boltStore).db.NoSync, sp.dir = true, ""
	if err := sp.attach([]string{"a"}); err != nil {
		t.Fatal(err)
	}
	wantWindows(t, drain(t, sp, "a"), 7*24*60)
}

func TestSpoolKeepsTheInstanceName(t *testing.T) {
	dir := t.TempDir()
	testSpool(t, dir).Close()
	sp, err := OpenSpool(SpoolConfig{Dir: dir, Group: "verve"})
	if err != nil {
		t.Fatal(err)
	}
	if sp.Instance() != "host-1" {
		t.Errorf("instance %q, want the kept host-1", sp.Instance())
	}
	sp.Close()

	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	sp, err = OpenSpool(SpoolConfig{Group: "verve"})
	if err != nil {
		t.Fatal(err)
	}
	if sp.Instance() != host {
		t.Errorf("instance %q, want the host name %q", sp.Instance(), host)
	}
}

func TestSpoolHasOneOwner(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	sp := testSpool(t, dir)
	defer sp.Close()
	_, err := OpenSpool(SpoolConfig{Dir: dir, Group: "verve"})
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("in use by process %d", os.Getpid())) {
		t.Errorf("second owner: %v", err)
	}
}

// A commit that fails may have been stored: the next append takes the same place
// and the same number.
func TestSpoolRepeatsAFailedAppendInPlace(t *testing.T) {
	dir := t.TempDir()
	sp := testSpool(t, dir)
	if err := sp.attach([]string{"a"}); err != nil {
		t.Fatal(err)
	}
	appendTo(t, sp, 0, 1)
	disk := sp.store
	for _, stored := range []bool{false, true} {
		sp.store = &failing{store: disk, stored: stored}
		r := record(1)
		if err := sp.append(&r, counter.KeyCounts{}, noStep); !errors.Is(err, errDisk) {
			t.Fatalf("append: %v", err)
		}
		if batch, err := sp.next("a", 10, batchKeys); err != nil || len(batch) != 1 {
			t.Fatalf("a record that was not appended is handed out: %d, %v", len(batch), err)
		}
	}
	sp.store = disk
	appendTo(t, sp, 1, 3)
	sp.Close()
	sp = testSpool(t, dir)
	defer sp.Close()
	if err := sp.attach([]string{"a"}); err != nil {
		t.Fatal(err)
	}
	wantWindows(t, drain(t, sp, "a"), 3)
}

// TestAcknowledgementThatFailedAndWasStoredIsRepeated: a sync that is interrupted may have done
// its work.
func TestAcknowledgementThatFailedAndWasStoredIsRepeated(t *testing.T) {
	dir, _ := twoKeyed(t, 0)
	sp, _ := openLogged(t, dir)
	if _, err := sp.store.advance("a", 1, 0, 1); err != nil {
		t.Fatal(err)
	}
	for to := range uint64(2) {
		if err := sp.ack("a", 1+to); err != nil {
			t.Fatal(err)
		}
	}
	if sp.pending != 0 || sp.removed != 2 {
		t.Errorf("%d records wait, %d were removed", sp.pending, sp.removed)
	}
	sp.Close()
	sp, _ = openLogged(t, dir)
	defer sp.Close()
	wantKeyed(t, "after a restart", dir, sp, []appended{{0, 5}, {1, 4}})
}

var errDisk = errors.New("no space left on device")

// failing fails each write, stored or not.
type failing struct {
	store
	stored bool
}

func (f *failing) put(e spooled, identity string, s series, beforeCommit func()) error {
	if f.stored {
		if err := f.store.put(e, identity, s, beforeCommit); err != nil {
			return err
		}
	}
	return errDisk
}

// TestSpoolCutShortUnderTheProcessIsAnError, again and again, and nobody waits for
// it: readiness and metrics say why, and the process can end.
func TestSpoolCutShortUnderTheProcessIsAnError(t *testing.T) {
	dir := t.TempDir()
	s := start(t, dir, Config{CountsFile: filepath.Join(dir, "counts.jsonl")})
	s.publish(t, 0, 3)
	s.flush(t, time.Minute)
	if err := os.Truncate(filepath.Join(dir, spoolFile), 4096); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 2 {
			ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
			if err := s.Publish(ctx, window(3)); !errors.Is(err, errDamaged) {
				t.Errorf("publish: %v", err)
			}
			cancel()
		}
		if st := s.Stats(); !strings.Contains(st.AppendError, errDamaged.Error()) {
			t.Errorf("the reason is %q", st.AppendError)
		}
		s.stop()
	}()
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Fatal("somebody waits")
	}
	if m := readCheckpoint(filepath.Join(dir, checkpointFile)); m.Seq != 3 {
		t.Errorf("the next process goes on behind record %d, want 3", m.Seq)
	}
}

// damageable returns the bytes of a spool file with ten records, closed.
func damageable(t *testing.T) []byte {
	t.Helper()
	dir := t.TempDir()
	sp := testSpool(t, dir)
	appendWithSink(t, sp)
	sp.Close()
	b, err := os.ReadFile(filepath.Join(dir, spoolFile))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func appendWithSink(t *testing.T, sp *Spool) {
	t.Helper()
	if err := sp.attach([]string{"a"}); err != nil {
		t.Fatal(err)
	}
	appendTo(t, sp, 0, 10)
}

// openDamaged opens the bytes and checks what must hold of any damage: no crash,
// and either all records as they were or the file set aside.
func openDamaged(t *testing.T, dir, what string, b []byte) (setAside bool) {
	t.Helper()
	path := filepath.Join(dir, spoolFile)
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
	sp, err := OpenSpool(SpoolConfig{Dir: dir, Group: "verve", Instance: "host-1"})
	if err != nil {
		t.Errorf("%s: %v", what, err)
		return true
	}
	defer os.Remove(path)
	defer sp.Close()
	if sp.setAside != "" {
		kept, err := os.ReadFile(sp.setAside)
		if err != nil || len(kept) != len(b) {
			t.Errorf("%s: set aside %d bytes of %d, %v", what, len(kept), len(b), err)
		}
		os.Remove(sp.setAside)
		setAside = true
	}
	if err := sp.attach([]string{"a"}); err != nil {
		t.Errorf("%s: %v", what, err)
		return setAside
	}
	got := drain(t, sp, "a")
	for i, r := range got {
		if want := record(i); r.Unique != want.Unique || r.Seq != uint64(i+1) {
			t.Errorf("%s: record %d is %+v", what, i, r)
		}
	}
	// A flipped bit in the newer of the two meta pages looks like a commit that
	// a crash cut short: bbolt goes on with the older one.
	if !setAside && len(got) < 9 {
		t.Errorf("%s: %d records and no word about the others", what, len(got))
	}
	// The next record must go in, whatever was found.
	appendTo(t, sp, 10, 11)
	return setAside
}

func TestSpoolCutShortIsSetAside(t *testing.T) {
	whole := damageable(t)
	dir := t.TempDir()
	if openDamaged(t, dir, "whole", whole) {
		t.Fatal("a sound file was set aside")
	}
	aside := 0
	for n := 512; n < len(whole); n += 512 {
		if openDamaged(t, dir, fmt.Sprintf("cut at %d of %d", n, len(whole)), whole[:n]) {
			aside++
		}
	}
	if aside == 0 {
		t.Error("no cut was found")
	}
	t.Logf("%d of %d cuts set aside, the others lost nothing", aside, len(whole)/512-1)
}

func TestSpoolWithAFlippedBitIsNeverMisread(t *testing.T) {
	whole := damageable(t)
	dir := t.TempDir()
	const header = 80 // page header and meta of each of the two meta pages
	var offsets []int
	for page := range 2 {
		for i := range header {
			offsets = append(offsets, page*os.Getpagesize()+i)
		}
	}
	for i := 2 * os.Getpagesize(); i < len(whole); i += 331 { // a sample of the rest
		offsets = append(offsets, i)
	}
	const flags, count, list, ids = 8, 10, 0x10, 16 // of a page of bbolt with the list of the free ones
	lists := 0
	for at := 0; at < len(whole); at += os.Getpagesize() {
		if p := whole[at:]; binary.NativeEndian.Uint16(p[flags:]) == list {
			lists++
			for i := range ids + 8*int(binary.NativeEndian.Uint16(p[count:])) {
				offsets = append(offsets, at+i)
			}
		} else {
			offsets = append(offsets, at, at+1) // the number of the page
		}
	}
	if lists == 0 {
		t.Error("no page with the list of free pages")
	}
	for _, i := range offsets {
		b := append([]byte(nil), whole...)
		b[i] ^= 1 << (i % 8)
		openDamaged(t, dir, fmt.Sprintf("bit flipped at %d", i), b)
	}
}

// TestSpoolOfTheFirstFormatGoesOn: testdata has the files that commit 9d5ec71 has left, before
// there were keys: windows 0 to 3 with a record each, of which three were delivered and the
// fourth is a dead letter, and two records of window 4.
func TestSpoolOfTheFirstFormatGoesOn(t *testing.T) {
	dir := t.TempDir()
	restore := func(name string) {
		t.Helper()
		packed, err := os.Open(filepath.Join("testdata", "first-format", name+".gz"))
		if err != nil {
			t.Fatal(err)
		}
		defer packed.Close()
		r, err := gzip.NewReader(packed)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), b, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	restore(spoolFile)
	restore(checkpointFile)
	if got := readCheckpoint(filepath.Join(dir, checkpointFile)); got.Seq != 6 || got.Unique != 2*window(4).Unique || got.Instance != "host-1" {
		t.Errorf("checkpoint %+v", got)
	}
	want := []int{3, 4, 4}
	for i := range 3 { // read as it is; with a record; with one that has keys
		sp, log := openLogged(t, dir)
		if log != "" || sp.deadLetters != 1 || sp.Instance() != "host-1" {
			t.Errorf("%d dead letters, instance %q, log %s", sp.deadLetters, sp.Instance(), log)
		}
		version := uint64(0)
		sp.store.(*boltStore).view(func(tx *bolt.Tx) (err error) {
			version, err = unsealUint(keyVersion, tx.Bucket(bucketMeta).Get(keyVersion))
			return err
		})
		if want := uint64([]int{firstVersion, spoolVersion, spoolVersion}[i]); version != want {
			t.Errorf("after %d records the format is %d, want %d: that commit must refuse what it cannot read", i, version, want)
		}
		last := want[len(want)-1]
		if at, unique := lastWindow(sp); !at.Equal(window(last).Start) || i == 0 && unique != 2*window(4).Unique {
			t.Errorf("last window %s with %d", at, unique)
		}
		batch, err := sp.next("a", batchSize, batchKeys)
		if err != nil || len(batch) != len(want) {
			t.Fatalf("%d records wait, %v, want %v", len(batch), err, want)
		}
		for j, e := range batch {
			if !e.record.WindowStart.Equal(window(want[j]).Start) || e.record.Seq != uint64(4+j) || len(e.keys.List()) != 4*max(0, j-3) {
				t.Errorf("record %d is %+v with %d keys", j, e.record, len(e.keys.List()))
			}
		}
		if i < 2 {
			r := record(5 + i)
			if err := sp.append(&r, withKeys(window(5+i), 4*i).Keys, noStep); err != nil {
				t.Fatal(err)
			}
			want = append(want, 5+i)
		}
		sp.Close()
	}
	// Where it is damaged, its numbers go on.
	dir = t.TempDir()
	restore(checkpointFile)
	if err := os.WriteFile(filepath.Join(dir, spoolFile), bytes.Repeat([]byte("x"), 1<<16), 0o644); err != nil {
		t.Fatal(err)
	}
	sp := testSpool(t, dir)
	defer sp.Close()
	r := record(5)
	if err := sp.append(&r, counter.KeyCounts{}, noStep); err != nil || r.Seq != 7 {
		t.Errorf("behind a damaged one: seq %d, %v", r.Seq, err)
	}
}

func TestSpoolRefusesOtherFormatsAndLeavesThemAlone(t *testing.T) {
	for _, version := range []uint64{firstVersion + 1, spoolVersion - 1, spoolVersion + 1} {
		dir, files := twoKeyed(t, 0)
		sp := testSpool(t, dir)
		err := sp.store.(*boltStore).update(func(tx *bolt.Tx) error {
			return put(tx.Bucket(bucketMeta), keyVersion, beKey(version))
		})
		if err != nil {
			t.Fatal(err)
		}
		sp.Close()
		_, err = OpenSpool(SpoolConfig{Dir: dir, Group: "verve"})
		if !errors.Is(err, errVersion) {
			t.Errorf("format %d: got %v", version, err)
		}
		for _, file := range append(files, filepath.Join(dir, spoolFile)) {
			if _, err := os.Stat(file); err != nil {
				t.Errorf("format %d: %v", version, err)
			}
		}
	}
}

func TestSpoolRefusesWhatIsNotItsFaultToRepair(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, spoolFile), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenSpool(SpoolConfig{Dir: dir, Group: "verve"}); err == nil {
		t.Error("a directory in the way was opened")
	}
	if _, err := OpenSpool(SpoolConfig{Dir: "/proc/nowhere", Group: "verve"}); err == nil {
		t.Error("a directory that cannot be made was opened")
	}
}

func TestSpoolForeignFileIsSetAside(t *testing.T) {
	if !openDamaged(t, t.TempDir(), "foreign", []byte(strings.Repeat("not a database\n", 4096))) {
		t.Error("a foreign file was used")
	}
}

func TestSpoolSetsPoisonAside(t *testing.T) {
	dir := t.TempDir()
	sp := testSpool(t, dir)
	appendWithSink(t, sp)
	batch, err := sp.next("a", 1, batchKeys)
	if err != nil {
		t.Fatal(err)
	}
	refuse := func() {
		t.Helper()
		if err := sp.deadLetter("a", batch[0], "too large,\nin two lines"); err != nil {
			t.Fatal(err)
		}
		if sp.deadLetters != 1 {
			t.Errorf("%d records set aside, want 1", sp.deadLetters)
		}
	}
	for range 2 { // again, as after an acknowledgement that failed
		refuse()
	}
	sp.Close() // and as after a kill before it
	sp = testSpool(t, dir)
	if err := sp.attach([]string{"a"}); err != nil {
		t.Fatal(err)
	}
	refuse()
	if err := sp.ack("a", 2); err != nil {
		t.Fatal(err)
	}
	if sp.removed != 1 {
		t.Errorf("%d records published, want 1: one of two was refused for good", sp.removed)
	}
	refused, delivered := window(0).Start, window(1).Start
	if a, b := sp.Delivered(refused), sp.Delivered(delivered); a != StateSpooled || b != StateDelivered {
		t.Errorf("states %q and %q, want %q and %q", a, b, StateSpooled, StateDelivered)
	}
	sp.Close()
	sp = testSpool(t, dir)
	defer sp.Close()
	if sp.deadLetters != 1 {
		t.Errorf("%d records set aside, want 1", sp.deadLetters)
	}
	if a := sp.Delivered(refused); a != StateSpooled {
		t.Errorf("state %q after a restart, want %q", a, StateSpooled)
	}
}
