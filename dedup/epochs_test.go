package dedup

import (
	"testing"

	"verve/counter"
	"verve/internal/epochtest"
)

// addOne does the same as addTo without an allocation.
func addOne(m *Memory, e *counter.Epoch, id []byte) (Verdict, error) {
	items, verdicts := [1]Item{{ID: id}}, [1]Verdict{Turned}
	m.Keys(items[:])
	err := m.AddMany(e, items[:], verdicts[:])
	return verdicts[0], err
}

// addTo makes the key of id and adds it.
func addTo(s Set, e *counter.Epoch, id []byte) (Verdict, error) {
	verdicts := [1]Verdict{Turned}
	items := []Item{{ID: id}}
	s.Keys(items)
	err := s.AddMany(e, items, verdicts[:])
	return verdicts[0], err
}

// epochs lets a test turn epochs by hand, and add ids to them.
type epochs struct{ epochtest.Epochs }

// newEpochs seals the counter when the test is over, and waits until every
// epoch is retired: the Set that was made before can then be closed.
func newEpochs(t testing.TB, s Set) epochs { return epochs{epochtest.New(t, s)} }

// add adds id to the n-th epoch.
func (e epochs) add(t testing.TB, s Set, n int, id string) (Verdict, error) {
	t.Helper()
	in, ok := e.Enter(e.At(n), 0, 1)
	if !ok {
		t.Fatal("the counter is sealed")
	}
	v, err := addTo(s, in.Epoch, []byte(id))
	leave(in, v)
	return v, err
}

// leave makes a request whose id got the verdict v leave its epoch.
func leave(in counter.Entry, v Verdict) {
	var n [Verdicts]uint64
	n[v] = 1
	in.Leave(n[Unique], n[Repeat], 1-n[Unique]-n[Repeat])
}

func (e epochs) want(t testing.TB, s Set, n int, id string, want Verdict) {
	t.Helper()
	if got, err := e.add(t, s, n, id); got != want || err != nil {
		t.Fatalf("epoch %d, id %q: got %v, %v; want %v", n, id, got, err, want)
	}
}

// twice adds each id two times in one batch: the second one is a repeat, whatever the verdict
// on the first is.
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
