package dedup

import (
	"context"
	"testing"
	"time"

	"verve/counter"
)

// addOne is addTo without an allocation.
func addOne(m *Memory, e *counter.Epoch, id []byte) (Verdict, error) {
	items, verdicts := [1]Item{{ID: id, Key: m.Key(id)}}, [1]Verdict{Turned}
	err := m.AddMany(e, items[:], verdicts[:])
	return verdicts[0], err
}

// addTo makes the key of id and adds it.
func addTo(s Set, e *counter.Epoch, id []byte) (Verdict, error) {
	verdicts := [1]Verdict{Turned}
	err := s.AddMany(e, []Item{{ID: id, Key: s.Key(id)}}, verdicts[:])
	return verdicts[0], err
}

// nobody publishes nothing: the tests read the counts of the epochs themselves.
type nobody struct{ counts chan counter.Count }

func (n nobody) Publish(_ context.Context, c counter.Count) error {
	if n.counts != nil {
		n.counts <- c
	}
	return nil
}

// epochs lets a test turn epochs by hand: at(n) is a time inside the n-th.
type epochs struct {
	*counter.Counter
	base int64
}

// newEpochs seals the counter when the test is over, and waits until every
// epoch is retired: the Set that was made before can then be closed.
func newEpochs(t testing.TB, s Set) epochs {
	c, err := counter.New(counter.Config{Window: time.Hour, Store: s, Publish: nobody{}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- c.Run(ctx) }()
	t.Cleanup(func() {
		c.Seal()
		// A test that failed may have left a request inside.
		defer time.AfterFunc(5*time.Second, stop).Stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return epochs{c, c.Last().Start().UnixNano()}
}

func (e epochs) at(n int) int64 { return e.base + int64(n)*int64(time.Hour) }

// add adds id to the n-th epoch.
func (e epochs) add(t testing.TB, s Set, n int, id string) (Verdict, error) {
	t.Helper()
	in, ok := e.Enter(e.at(n), 0)
	if !ok {
		t.Fatal("the counter is sealed")
	}
	v, err := addTo(s, in.Epoch, []byte(id))
	switch {
	case err != nil || v == Turned:
		in.Leave(counter.Void)
	case v == Unique:
		in.Leave(counter.Unique)
	default:
		in.Leave(counter.Repeat)
	}
	return v, err
}

func (e epochs) want(t testing.TB, s Set, n int, id string, want Verdict) {
	t.Helper()
	if got, err := e.add(t, s, n, id); got != want || err != nil {
		t.Fatalf("epoch %d, id %q: got %v, %v; want %v", n, id, got, err, want)
	}
}

// alike are ids that a careless set takes for one another.
var alike = []string{
	"0", "00", "42", "042", "+42", " 42", "42.0", "0x2a", "٤٢",
	"18446744073709551615", "18446744073709551616", "9223372036854775807",
	"3f333df6-90a4-4fda-8dd3-9485d27cee36", "3F333DF6-90A4-4FDA-8DD3-9485D27CEE36",
	"3f333df690a44fda8dd39485d27cee36", "{3f333df6-90a4-4fda-8dd3-9485d27cee36}",
	"00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff",
	"00000000-0000-0000-0000-00000000002a",
	"a", "A", "\u00e9", "e\u0301", "a\x00", "a\x00\x00",
}

// twice adds each id two times in one batch: the second is a repeat of the first, whatever
// that is.
type twice struct {
	*Memory
	t testing.TB
}

func (s twice) AddMany(e *counter.Epoch, items []Item, verdicts []Verdict) error {
	two := make([]Item, 0, 2*len(items))
	for _, it := range items {
		two = append(two, it, it)
	}
	of := make([]Verdict, len(two))
	for i := range of {
		of[i] = Turned
	}
	err := s.Memory.AddMany(e, two, of)
	for i := range items {
		if verdicts[i] = of[2*i]; verdicts[i] != Turned && verdicts[i] != Full && of[2*i+1] == Unique {
			s.t.Errorf("id %q twice: %v", items[i].ID, of[2*i:2*i+2])
		}
	}
	return err
}
