package bench

// Maps is what a Go programmer reaches for first: Go maps in shards, each
// behind its mutex.
type Maps struct {
	shards[map[uint64]struct{}, map[wide]struct{}]
}

// NewMaps makes maps of the size expected.
func NewMaps(expect Sizes) *Maps {
	m := new(Maps)
	m.empty = func(numbers map[uint64]struct{}, others map[wide]struct{}) int {
		held := len(numbers) + len(others)
		clear(numbers)
		clear(others)
		return held
	}
	for i := range m.all {
		m.all[i].numbers = make(map[uint64]struct{}, expect.Numbers/shardCount)
		m.all[i].others = make(map[wide]struct{}, expect.Others/shardCount)
	}
	return m
}

// Add implements Design.
func (m *Maps) Add(id []byte, _ int) bool {
	n, w, isNumber := parse(id)
	if isNumber {
		s := m.lock(shardOfNumber(n))
		defer s.mu.Unlock()
		// Growing tells a new key from an old one with a single look-up.
		before := len(s.numbers)
		s.numbers[n] = struct{}{}
		return len(s.numbers) > before
	}
	s := m.lock(shardOfWide(&w))
	defer s.mu.Unlock()
	before := len(s.others)
	s.others[w] = struct{}{}
	return len(s.others) > before
}
