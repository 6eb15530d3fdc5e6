package server

import (
	"bytes"

	"verve/counter"
	"verve/dedup"
)

var (
	acceptStart = []byte("GET " + acceptPath + "?id=")
	headersEnd  = []byte("\r\n\r\n")
)

// prefetch looks for the ids of pipelined requests in what was received, and
// has the set bring their places near: answered one after the other, each
// request would wait for memory by itself. A guess at what follows; the parsing
// is done by those who answer. Where only one request came it does nothing.
func (s *Server) prefetch(set dedup.Prefetcher, received []byte) {
	end := bytes.Index(received, headersEnd)
	if end < 0 || end+len(headersEnd) == len(received) {
		return
	}
	var ids [dedup.PrefetchMax][]byte
	n := 0
	for n < len(ids) && end >= 0 {
		if id, ok := bytes.CutPrefix(received, acceptStart); ok {
			if space := bytes.IndexByte(id, ' '); space > 0 {
				ids[n] = id[:space]
				n++
			}
		}
		size := end + len(headersEnd)
		received = received[size:]
		// The requests of a client are mostly of one size.
		if len(received) < size || !bytes.Equal(received[end:size], headersEnd) {
			end = bytes.Index(received, headersEnd)
		}
	}
	// The time 0 turns no epoch: that is for the requests themselves.
	if in, open := s.cfg.Counter.Enter(0, uint64(n)); open {
		set.Prefetch(in.Epoch, ids[:n])
		in.Leave(counter.Void)
	}
}
