package stream

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	bolt "go.etcd.io/bbolt"

	"verve/counter"
	"verve/internal/durable"
	"verve/internal/testproc"
)

// keyFileNames are those in a data directory.
func keyFileNames(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(dir, keyFilesDir))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// appended is a record that was appended, at the place of its index, from 1.
type appended struct{ at, keys int }

// keysRun appends and acknowledges, and copies the directory at every change of the disk.
type keysRun struct {
	*testing.T
	sp      *Spool
	dir     string
	records []appended
	copies  []keysCopy
	seen    map[string][]byte // every file of keys that was there, whole
}

// keysCopy is what a kill leaves.
type keysCopy struct {
	dir     string
	records []appended // of these the last one may not be there
}

func (k *keysRun) copy() {
	c := keysCopy{filepath.Join(k.TempDir(), "copy"), slices.Clone(k.records)}
	if err := os.CopyFS(c.dir, os.DirFS(k.dir)); err != nil {
		k.Fatal(err)
	}
	k.copies = append(k.copies, c)
	for _, name := range keyFileNames(k.T, k.dir) {
		if name == nextKeyFile || k.seen[name] != nil {
			continue // a part, or it is being removed
		}
		b, err := os.ReadFile(filepath.Join(k.dir, keyFilesDir, name))
		if err != nil {
			k.Fatal(err)
		}
		k.seen[name] = b
	}
}

func (k *keysRun) append(at, keys int) {
	k.Helper()
	k.records = append(k.records, appended{at, keys})
	r := record(at)
	if err := k.sp.append(&r, withKeys(window(at), keys).Keys, func(string) { k.copy() }); err != nil {
		k.Fatal(err)
	}
	k.copy()
}

func (k *keysRun) ack(to uint64) {
	k.Helper()
	if err := k.sp.ack("a", to); err != nil {
		k.Fatal(err)
	}
	k.copy()
}

// wantKeyed checks that the spool has the records, or all but the last one, the keys of those
// that wait, the sums of the last window, and the files of these alone.
func wantKeyed(t *testing.T, what, dir string, sp *Spool, records []appended) {
	t.Helper()
	if sp.setAside != "" || sp.keysLost != nil {
		t.Fatalf("%s: set aside %q, lost %v", what, sp.setAside, sp.keysLost)
	}
	if sp.head+1 != uint64(len(records)) && sp.head != uint64(len(records)) {
		t.Fatalf("%s: %d records, want %d", what, sp.head, len(records))
	}
	records = records[:sp.head]
	batch, err := sp.next("a", batchSize, 1<<60)
	if err != nil || len(batch) != sp.pending {
		t.Fatalf("%s: %d records of %d, %v", what, len(batch), sp.pending, err)
	}
	files := map[uint64]bool{}
	for _, e := range batch {
		of := records[e.index-1]
		if want := withKeys(window(of.at), of.keys).Keys.List(); !slices.Equal(e.keys.List(), want) || !e.record.WindowStart.Equal(window(of.at).Start) {
			t.Errorf("%s: record %d has %d keys, want %d", what, e.index, len(e.keys.List()), len(want))
		}
		files[e.index] = of.keys > 0
	}
	sums := map[string]uint64{}
	for i := len(records); i > 0 && records[i-1].at == records[len(records)-1].at; i-- {
		for _, key := range withKeys(counter.Count{}, records[i-1].keys).Keys.List() {
			sums[key.Key] += key.Unique
		}
		files[uint64(i)] = records[i-1].keys > 0
	}
	got := map[string]uint64{}
	for _, key := range sp.Published()["verve/host-1"].Keys.List() {
		got[key.Key] += key.Unique
	}
	if !maps.Equal(got, sums) {
		t.Errorf("%s: the last window has %d keys, want %d", what, len(got), len(sums))
	}
	var names, want []string
	for index, keyed := range files {
		if keyed {
			want = append(want, fmt.Sprintf("%016x", index))
		}
	}
	for _, name := range keyFileNames(t, dir) {
		names = append(names, strings.Split(name, "-")[0])
	}
	if slices.Sort(want); !slices.Equal(names, want) {
		t.Errorf("%s: files %q, want %q", what, names, want)
	}
}

// TestKeysSurviveAKillAtAnyChangeOfTheDisk, and a loss of power, which leaves of what was not
// synced a part or none, and may undo a removal. No file stays behind.
func TestKeysSurviveAKillAtAnyChangeOfTheDisk(t *testing.T) {
	t.Parallel()
	k := &keysRun{T: t, dir: t.TempDir(), seen: map[string][]byte{}}
	k.sp = testSpool(t, k.dir)
	if err := k.sp.attach([]string{"a"}); err != nil {
		t.Fatal(err)
	}
	k.sp.files.testStep = k.copy
	k.append(0, 9000) // pieces, when it is written and when it is removed
	k.append(1, 3)
	k.append(1, 5)
	k.ack(1)
	k.append(1, 0)
	k.ack(3)
	k.append(2, 4)
	k.ack(5)
	k.append(3, 0)
	k.sp.Close()
	if len(k.copies) < 40 {
		t.Fatalf("%d copies: the steps are not called", len(k.copies))
	}
	files := func(dir string, change func(path string)) {
		for _, name := range keyFileNames(t, dir) {
			change(filepath.Join(dir, keyFilesDir, name))
		}
	}
	isOf := func(path string, index int) bool {
		return strings.HasPrefix(filepath.Base(path), fmt.Sprintf("%016x-", index))
	}
	write := func(path string, b []byte) {
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for i, c := range k.copies {
		for what, change := range map[string]func(committed uint64, dir string){
			"a kill": func(uint64, string) {},
			"a part": func(committed uint64, dir string) {
				files(dir, func(path string) {
					if filepath.Base(path) == nextKeyFile || isOf(path, int(committed)+1) {
						os.Truncate(path, 7)
					}
				})
			},
			"zeros": func(committed uint64, dir string) {
				files(dir, func(path string) {
					if filepath.Base(path) == nextKeyFile || isOf(path, int(committed)+1) {
						write(path, make([]byte, 5000))
					}
				})
			},
			"removed files are back": func(committed uint64, dir string) {
				if os.MkdirAll(filepath.Join(dir, keyFilesDir), 0o755) != nil {
					t.Fatal()
				}
				for name, b := range k.seen {
					if name > fmt.Sprintf("%016x", committed+2) {
						continue // it was not there yet
					}
					write(filepath.Join(dir, keyFilesDir, name), b)
				}
			},
		} {
			dir := filepath.Join(t.TempDir(), "again")
			if err := os.CopyFS(dir, os.DirFS(c.dir)); err != nil {
				t.Fatal(err)
			}
			change(committedHead(t, dir), dir)
			sp := testSpool(t, dir)
			if err := sp.attach([]string{"a"}); err != nil {
				t.Fatal(err)
			}
			wantKeyed(t, fmt.Sprintf("copy %d, %s", i, what), dir, sp, c.records)
			// It goes on.
			records := append(slices.Clone(c.records[:sp.head]), appended{9, 6})
			r := record(9)
			if err := sp.append(&r, withKeys(window(9), 6).Keys, noStep); err != nil {
				t.Fatal(err)
			}
			wantKeyed(t, fmt.Sprintf("copy %d, %s, and a record", i, what), dir, sp, records)
			sp.Close()
		}
	}
}

// committedHead is the index of the last record of a copy.
func committedHead(t *testing.T, dir string) (head uint64) {
	t.Helper()
	db, err := bolt.Open(filepath.Join(dir, spoolFile), 0o644, &bolt.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	err = db.View(func(tx *bolt.Tx) (err error) {
		head, err = unsealUint(keyHead, tx.Bucket(bucketMeta).Get(keyHead))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return head
}

// TestFullDiskTakesNoKeysAndNoRecord: none is there until the next try, which finds room.
func TestFullDiskTakesNoKeysAndNoRecord(t *testing.T) {
	c := childSpec{Dir: t.TempDir(), DiskFull: true, Until: 4, Keys: 8000}
	sp := c.filled(t)
	wantKeyed(t, "after a full disk", c.Dir, sp, []appended{{0, 8000}, {1, 8000}, {2, 8000}, {3, 8000}})
}

// damageKeys are the ways in which a file of keys is not what was written.
var damageKeys = map[string]func(t *testing.T, path, other string){
	"missing": func(t *testing.T, path, _ string) { os.Remove(path) },
	"cut":     func(t *testing.T, path, _ string) { os.Truncate(path, 20) },
	"empty":   func(t *testing.T, path, _ string) { os.Truncate(path, 0) },
	"zeros":   func(t *testing.T, path, _ string) { rewriteKeys(t, path, func(b []byte) { clear(b) }) },
	"a bit":   func(t *testing.T, path, _ string) { rewriteKeys(t, path, func(b []byte) { b[len(b)/2] ^= 1 }) },
	"another": func(t *testing.T, path, other string) {
		b, err := os.ReadFile(other)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
	},
}

func rewriteKeys(t *testing.T, path string, change func([]byte)) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	change(b)
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

// openLogged opens a spool with the sink a, and returns what it has logged.
func openLogged(t *testing.T, dir string) (*Spool, string) {
	t.Helper()
	var log testproc.Buffer
	sp, err := OpenSpool(SpoolConfig{Dir: dir, Group: "verve", Instance: "host-1", Log: zerolog.New(&log)})
	if err != nil {
		t.Fatal(err)
	}
	if err := sp.attach([]string{"a"}); err != nil {
		t.Fatal(err)
	}
	return sp, log.String()
}

// twoKeyed is a data directory with a record for each of windows 0 and 1, with 5 and 4 keys, of
// which so many were delivered, and the files of their keys.
func twoKeyed(t *testing.T, delivered uint64) (dir string, files []string) {
	t.Helper()
	dir = t.TempDir()
	sp, _ := openLogged(t, dir)
	for i := range 2 {
		r := record(i)
		if err := sp.append(&r, withKeys(window(i), 5-i).Keys, noStep); err != nil {
			t.Fatal(err)
		}
	}
	if delivered > 0 {
		if err := sp.ack("a", delivered); err != nil {
			t.Fatal(err)
		}
	}
	sp.Close()
	for _, name := range keyFileNames(t, dir) {
		files = append(files, filepath.Join(dir, keyFilesDir, name))
	}
	return dir, files
}

// TestSpoolWithDamagedKeysIsSetAsideWithThem: no record is delivered with keys that are not
// its own, and what is left of both is under one name.
func TestSpoolWithDamagedKeysIsSetAsideWithThem(t *testing.T) {
	for what, damage := range damageKeys {
		dir, files := twoKeyed(t, 0)
		damage(t, files[0], files[1])
		sp, log := openLogged(t, dir)
		_, suffix, _ := strings.Cut(sp.setAside, spoolFile)
		if suffix == "" || !strings.Contains(log, "set aside") {
			t.Errorf("%s: set aside %q, log %s", what, sp.setAside, log)
		}
		left, err := os.ReadDir(filepath.Join(dir, keyFilesDir+suffix))
		if want := 2; err != nil || len(left) != want && !(what == "missing" && len(left) == want-1) {
			t.Errorf("%s: %d files of keys set aside, %v", what, len(left), err)
		}
		if p := sp.Published()["verve/host-1"]; !p.KeysLost {
			t.Errorf("%s: published %+v", what, p)
		}
		r := record(2)
		if err := sp.append(&r, withKeys(window(2), 3).Keys, noStep); err != nil || r.Seq != 3 {
			t.Errorf("%s: the next record has seq %d, %v", what, r.Seq, err)
		}
		sp.Close()
	}
}

// TestSpoolWithAFlippedBitHasTheKeysOfItsRecords, or is set aside.
func TestSpoolWithAFlippedBitHasTheKeysOfItsRecords(t *testing.T) {
	whole, _ := twoKeyed(t, 0)
	info, err := os.Stat(filepath.Join(whole, spoolFile))
	if err != nil {
		t.Fatal(err)
	}
	aside := 0
	for at := int64(0); at < info.Size(); at += 211 {
		dir := filepath.Join(t.TempDir(), "flipped")
		if err := os.CopyFS(dir, os.DirFS(whole)); err != nil {
			t.Fatal(err)
		}
		rewriteKeys(t, filepath.Join(dir, spoolFile), func(b []byte) { b[at] ^= 1 << (at % 8) })
		sp := testSpool(t, dir)
		if err := sp.attach([]string{"a"}); errors.Is(err, errDamaged) {
			aside++ // a list of free pages: bbolt finds it when it writes
			sp.Close()
			continue
		} else if err != nil {
			t.Fatal(err)
		}
		batch, err := sp.next("a", 10, batchKeys)
		if err != nil {
			t.Errorf("bit flipped at %d: %v", at, err)
		}
		for _, e := range batch {
			i := int(e.record.WindowStart.Sub(window(0).Start) / time.Minute)
			if want := withKeys(window(i), 5-i).Keys.List(); !slices.Equal(e.keys.List(), want) {
				t.Errorf("bit flipped at %d: record %d has %d keys", at, e.index, len(e.keys.List()))
			}
		}
		switch {
		case sp.setAside != "":
			aside++
		case len(batch) == 0:
			t.Errorf("bit flipped at %d: no record, and nothing is set aside", at)
		}
		sp.Close()
	}
	if aside == 0 {
		t.Error("no bit was found")
	}
}

// TestDamagedKeysOfTheLastWindowAreLostAlone: its record is delivered, and so nothing of the
// spool is set aside; the log names the file.
func TestDamagedKeysOfTheLastWindowAreLostAlone(t *testing.T) {
	for what, damage := range damageKeys {
		dir, files := twoKeyed(t, 2)
		if len(files) != 1 {
			t.Fatalf("files %q", files)
		}
		other := filepath.Join(dir, "other")
		if err := os.WriteFile(other, []byte("\x01a\x01"), 0o644); err != nil {
			t.Fatal(err)
		}
		damage(t, files[0], other)
		for range 2 { // also at the start after that, if nothing was published meanwhile
			sp, log := openLogged(t, dir)
			p := sp.Published()["verve/host-1"]
			if sp.setAside != "" || !p.KeysLost || p.Unique != window(1).Unique || !strings.Contains(log, filepath.Base(files[0])) {
				t.Errorf("%s: set aside %q, published %+v, log %s", what, sp.setAside, p, log)
			}
			sp.Close()
		}
		sp, _ := openLogged(t, dir)
		for i, lost := range []bool{true, false} {
			r := record(1 + i)
			if err := sp.append(&r, withKeys(window(1+i), 2).Keys, noStep); err != nil {
				t.Fatal(err)
			}
			sp.Close()
			sp, _ = openLogged(t, dir)
			if p := sp.Published()["verve/host-1"]; p.KeysLost != lost || sp.pending != 1+i {
				t.Errorf("%s: window %d: published %+v, %d pending", what, 1+i, p, sp.pending)
			}
		}
		sp.Close()
	}
}

// TestKeysThatCannotBeReadAreNotDelivered and are tried again.
func TestKeysThatCannotBeReadAreNotDelivered(t *testing.T) {
	for what, damage := range damageKeys {
		dir, files := twoKeyed(t, 0)
		sp, _ := openLogged(t, dir)
		kept, err := os.ReadFile(files[0])
		if err != nil {
			t.Fatal(err)
		}
		damage(t, files[0], files[1])
		if batch, err := sp.next("a", 10, batchKeys); !errors.Is(err, errDamaged) || !strings.Contains(err.Error(), filepath.Base(files[0])) {
			t.Errorf("%s: %d records, %v", what, len(batch), err)
		}
		if err := os.WriteFile(files[0], kept, 0o644); err != nil {
			t.Fatal(err)
		}
		wantKeyed(t, what, dir, sp, []appended{{0, 5}, {1, 4}})
		sp.Close()
	}
}

// TestFilesOfKeysWithoutASpoolAreSetAside: somebody may put the file of the spool back.
func TestFilesOfKeysWithoutASpoolAreSetAside(t *testing.T) {
	dir, files := twoKeyed(t, 0)
	if err := os.Rename(filepath.Join(dir, spoolFile), filepath.Join(dir, "moved")); err != nil {
		t.Fatal(err)
	}
	sp, log := openLogged(t, dir)
	sp.Close()
	aside, err := filepath.Glob(filepath.Join(dir, keyFilesDir+durable.DamagedSuffix+"*"))
	if err != nil || len(aside) != 1 || !strings.Contains(log, aside[0]) {
		t.Fatalf("set aside %q, %v, log %s", aside, err, log)
	}
	if err := os.Rename(filepath.Join(dir, "moved"), filepath.Join(dir, spoolFile)); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(aside[0], filepath.Join(dir, keyFilesDir)); err != nil {
		t.Fatal(err)
	}
	sp, _ = openLogged(t, dir)
	defer sp.Close()
	if wantKeyed(t, "put back", dir, sp, []appended{{0, 5}, {1, 4}}); len(files) != 2 {
		t.Errorf("files %q", files)
	}
}

// TestASpoolThatIsNotTheLastOneIsNamedInTheLog: it was taken away, or is an earlier copy.
// Records that waited are not lost silently, with keys or without.
func TestASpoolThatIsNotTheLastOneIsNamedInTheLog(t *testing.T) {
	const reason = "taken away or is an earlier copy"
	for _, keys := range []int{0, 5} {
		dir := t.TempDir()
		earlier := filepath.Join(t.TempDir(), "earlier")
		sp, _ := openLogged(t, dir)
		for i := range 2 {
			r := record(i)
			if err := sp.append(&r, withKeys(window(i), keys).Keys, noStep); err != nil {
				t.Fatal(err)
			}
			if i == 0 {
				if err := os.CopyFS(earlier, os.DirFS(dir)); err != nil {
					t.Fatal(err)
				}
			}
		}
		sp.Close()
		sp, log := openLogged(t, dir)
		sp.Close()
		if strings.Contains(log, reason) {
			t.Errorf("%d keys: the last one: log %s", keys, log)
		}
		for what, change := range map[string]func(dir string) error{
			"taken away": func(dir string) error { return os.Remove(filepath.Join(dir, spoolFile)) },
			"taken away with keys": func(dir string) error {
				return errors.Join(os.Remove(filepath.Join(dir, spoolFile)), os.RemoveAll(filepath.Join(dir, keyFilesDir)))
			},
			"an earlier copy": func(dir string) error {
				return os.Rename(filepath.Join(earlier, spoolFile), filepath.Join(dir, spoolFile))
			},
		} {
			copied := filepath.Join(t.TempDir(), "copied")
			if err := errors.Join(os.CopyFS(copied, os.DirFS(dir)), change(copied)); err != nil {
				t.Fatal(err)
			}
			sp, log := openLogged(t, copied)
			if !strings.Contains(log, reason) || !strings.Contains(log, `"last_seq":2`) {
				t.Errorf("%d keys, %s: log %s", keys, what, log)
			}
			r := record(2)
			if err := sp.append(&r, withKeys(window(2), keys).Keys, noStep); err != nil || r.Seq != 3 {
				t.Errorf("%d keys, %s: the next record has seq %d, %v", keys, what, r.Seq, err)
			}
			sp.Close()
			sp, log = openLogged(t, copied)
			sp.Close()
			if strings.Contains(log, reason) {
				t.Errorf("%d keys, %s: again at the next start: log %s", keys, what, log)
			}
		}
	}
}

// TestARecordWhoseReferenceIsGoneIsNotDeliveredWithoutItsKeys: bbolt does not check its pages.
func TestARecordWhoseReferenceIsGoneIsNotDeliveredWithoutItsKeys(t *testing.T) {
	dir, _ := twoKeyed(t, 0)
	sp, _ := openLogged(t, dir)
	defer sp.Close()
	err := sp.store.(*boltStore).update(func(tx *bolt.Tx) error {
		records := tx.Bucket(bucketRecords)
		_, record, err := splitEntry(beKey(1), records.Get(beKey(1)))
		if err != nil {
			return err
		}
		return put(records, beKey(1), bytes.Clone(record))
	})
	if err != nil {
		t.Fatal(err)
	}
	if batch, err := sp.next("a", 10, batchKeys); !errors.Is(err, errDamaged) {
		t.Errorf("%d records, %v", len(batch), err)
	}
}

// TestTheLastSpoolHasItsKeysAfterAnEarlierCopyWasInItsPlace, which has published meanwhile. When
// that has gone on, and the last one did not come back, its files are removed.
func TestTheLastSpoolHasItsKeysAfterAnEarlierCopyWasInItsPlace(t *testing.T) {
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	publish := func(sp *Spool, at int) {
		t.Helper()
		r := record(at)
		if err := sp.append(&r, withKeys(window(at), 5+at).Keys, noStep); err != nil {
			t.Fatal(err)
		}
	}
	sp, _ := openLogged(t, dir)
	publish(sp, 0)
	earlier, err := os.ReadFile(file(spoolFile))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 4 {
		publish(sp, 1+i)
	}
	sp.Close()
	if err := errors.Join(os.Rename(file(spoolFile), file("last")), os.WriteFile(file(spoolFile), earlier, 0o644)); err != nil {
		t.Fatal(err)
	}
	sp, _ = openLogged(t, dir)
	publish(sp, 5)
	sp.Close()
	if err := errors.Join(os.Rename(file(spoolFile), file("earlier")), os.Rename(file("last"), file(spoolFile))); err != nil {
		t.Fatal(err)
	}
	sp, _ = openLogged(t, dir)
	batch, err := sp.next("a", 10, batchKeys)
	if err != nil || len(batch) != 5 || sp.setAside != "" {
		t.Fatalf("%d records, %v, set aside %q", len(batch), err, sp.setAside)
	}
	for i, e := range batch {
		if want := withKeys(window(i), 5+i).Keys.List(); !slices.Equal(e.keys.List(), want) {
			t.Errorf("record %d has %d keys, want %d", e.index, len(e.keys.List()), len(want))
		}
	}
	sp.Close()
	if err := os.WriteFile(file(spoolFile), earlier, 0o644); err != nil {
		t.Fatal(err)
	}
	sp, _ = openLogged(t, dir)
	for i := range 5 {
		publish(sp, 6+i)
	}
	sp.Close()
	sp, _ = openLogged(t, dir)
	defer sp.Close()
	if got := keyFileNames(t, dir); len(got) != 6 {
		t.Errorf("files %q, want those of 6 records", got)
	}
}

// TestKeysThatAreSetAsideWhenThereIsRoomAgainAreNamedInTheLog: there was none at the start.
func TestKeysThatAreSetAsideWhenThereIsRoomAgainAreNamedInTheLog(t *testing.T) {
	dir, _ := twoKeyed(t, 0)
	var log testproc.Buffer
	sp, err := OpenSpool(SpoolConfig{Dir: dir, Group: "verve", Instance: "host-1", Log: zerolog.New(&log)})
	if err != nil {
		t.Fatal(err)
	}
	sp.Close()
	if err := os.Remove(filepath.Join(dir, spoolFile)); err != nil {
		t.Fatal(err)
	}
	sp.store, sp.unmade = newMemoryStore(0), errDisk
	r := record(2)
	if err := sp.append(&r, withKeys(window(2), 3).Keys, noStep); err != nil {
		t.Fatal(err)
	}
	defer sp.Close()
	aside, err := filepath.Glob(filepath.Join(dir, keyFilesDir+durable.DamagedSuffix+"*"))
	if err != nil || len(aside) != 1 || !strings.Contains(log.String(), aside[0]) {
		t.Errorf("set aside %q, %v, log %s", aside, err, log.String())
	}
}

// TestAStartReadsTheKeysOfALongOutageWithoutARest: nothing is served meanwhile, and days
// without a broker have left thousands of files.
func TestAStartReadsTheKeysOfALongOutageWithoutARest(t *testing.T) {
	dir := t.TempDir()
	sp, _ := openLogged(t, dir)
	defer func() { sp.Close() }()
	const records = 4
	for i := range records {
		r := record(i)
		if err := sp.append(&r, withKeys(window(i), 50_000).Keys, noStep); err != nil {
			t.Fatal(err)
		}
	}
	start, delivery := time.Hour, time.Hour
	for range 5 {
		sp.Close()
		began := time.Now()
		sp, _ = openLogged(t, dir)
		start = min(start, time.Since(began))
		began = time.Now()
		if batch, err := sp.next("a", records, 1<<60); err != nil || len(batch) != records {
			t.Fatalf("%d records, %v", len(batch), err)
		}
		delivery = min(delivery, time.Since(began))
	}
	if start > delivery/2 {
		t.Errorf("the start took %s, and the reading that gives way to requests %s", start, delivery)
	}
}

// TestSpoolLeavesOtherFilesBesideItsKeys as they are.
func TestSpoolLeavesOtherFilesBesideItsKeys(t *testing.T) {
	dir, _ := twoKeyed(t, 0)
	note := filepath.Join(dir, keyFilesDir, "README")
	if err := os.WriteFile(note, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	sp, _ := openLogged(t, dir)
	defer sp.Close()
	if _, err := os.Stat(note); err != nil {
		t.Error(err)
	}
}

// TestARecordInThePlaceOfOneThatFailed has its own keys, the same or others, also where the
// first one was stored although the disk refused it. The first one has its own until then,
// wherever a kill falls.
func TestARecordInThePlaceOfOneThatFailed(t *testing.T) {
	for _, again := range []appended{{0, 5}, {1, 0}, {1, 3}, {1, 7}} {
		dir := t.TempDir()
		sp, _ := openLogged(t, dir)
		disk := sp.store
		sp.store = &failing{disk, true}
		r := record(0)
		if err := sp.append(&r, withKeys(window(0), 5).Keys, noStep); !errors.Is(err, errDisk) {
			t.Fatal(err)
		}
		sp.store = disk
		want := map[string]appended{dir: again}
		kill := func() {
			killed := filepath.Join(t.TempDir(), "killed")
			if err := os.CopyFS(killed, os.DirFS(dir)); err != nil {
				t.Error(err)
			}
			want[killed] = appended{0, 5}
		}
		sp.files.testStep = kill
		r = record(again.at)
		if err := sp.append(&r, withKeys(window(again.at), again.keys).Keys, func(string) { kill() }); err != nil {
			t.Fatal(err)
		}
		sp.Close()
		for dir, want := range want {
			sp, _ := openLogged(t, dir)
			wantKeyed(t, fmt.Sprint(want), dir, sp, []appended{want})
			sp.Close()
		}
	}
}

// TestKeysOfEveryNameOnADirectoryStay until the name has a later window.
func TestKeysOfEveryNameOnADirectoryStay(t *testing.T) {
	dir := t.TempDir()
	publish := func(instance string, at, keys int) map[string]counter.Published {
		t.Helper()
		sp, err := OpenSpool(SpoolConfig{Dir: dir, Group: "verve", Instance: instance})
		if err != nil {
			t.Fatal(err)
		}
		defer sp.Close()
		r := record(at)
		r.Instance = instance
		if err := sp.append(&r, withKeys(window(at), keys).Keys, noStep); err != nil {
			t.Fatal(err)
		}
		return sp.Published()
	}
	publish("host-1", 1, 3)
	publish("host-2", 1, 4)
	publish("host-2", 2, 0)
	all := publish("host-1", 1, 2)
	if got := all["verve/host-1"]; got.Keys.Len() != 3 || got.Keys.List()[0].Unique != 2 || all["verve/host-2"].Keys.Len() != 0 {
		t.Errorf("published %+v", all)
	}
	if got := keyFileNames(t, dir); len(got) != 2 {
		t.Errorf("files %q, want the two of host-1 in its last window", got)
	}
}

// TestPackedKeysComeInPiecesOfWholeKeys, wherever the pieces end.
func TestPackedKeysComeInPiecesOfWholeKeys(t *testing.T) {
	files := &keyFiles{dir: filepath.Join(t.TempDir(), keyFilesDir)}
	for shift := range 40 {
		keys := []counter.KeyCount{{Key: strings.Repeat("x", shift+1), Unique: 1}}
		for i := range 1500 {
			keys = append(keys, counter.KeyCount{Key: fmt.Sprintf("%0*d", 1+i%counter.MaxKeyLen, i), Unique: 1 << (i % 64)})
		}
		p := counter.KeyCountsOf(keys...)
		for _, piece := range p.Pieces() {
			if len(piece) > counter.KeyPiece {
				t.Fatalf("a piece of %d bytes", len(piece))
			}
		}
		f, err := files.write(7, p)
		if err != nil || f.size != uint64(p.Size()) {
			t.Fatalf("%+v, %v", f, err)
		}
		slices.SortFunc(keys, func(a, b counter.KeyCount) int { return strings.Compare(a.Key, b.Key) })
		got, err := files.read(f)
		if err != nil || got.Len() != len(keys) || !slices.Equal(got.List(), keys) || !slices.Equal(p.List(), keys) {
			t.Fatalf("%d keys, %v, want %d", got.Len(), err, len(keys))
		}
	}
}
