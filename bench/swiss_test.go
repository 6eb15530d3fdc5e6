package bench

import "github.com/dolthub/swiss"

// Swiss is Maps with the maps of dolthub/swiss, which take less memory.
type Swiss struct {
	shards[*swiss.Map[uint64, struct{}], *swiss.Map[wide, struct{}]]
}

// NewSwiss makes maps of the size expected.
func NewSwiss(expect Sizes) *Swiss {
	m := new(Swiss)
	m.empty = func(numbers *swiss.Map[uint64, struct{}], others *swiss.Map[wide, struct{}]) int {
		held := numbers.Count() + others.Count()
		numbers.Clear()
		others.Clear()
		return held
	}
	for i := range m.all {
		m.all[i].numbers = swiss.NewMap[uint64, struct{}](uint32(expect.Numbers / shardCount))
		m.all[i].others = swiss.NewMap[wide, struct{}](uint32(expect.Others / shardCount))
	}
	return m
}

// Add implements Design.
func (m *Swiss) Add(id []byte, _ int) bool {
	n, w, isNumber := parse(id)
	if isNumber {
		s := m.lock(shardOfNumber(n))
		defer s.mu.Unlock()
		before := s.numbers.Count()
		s.numbers.Put(n, struct{}{})
		return s.numbers.Count() > before
	}
	s := m.lock(shardOfWide(&w))
	defer s.mu.Unlock()
	before := s.others.Count()
	s.others.Put(w, struct{}{})
	return s.others.Count() > before
}
