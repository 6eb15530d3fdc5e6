package server

import (
	"bytes"

	"verve/dedup"
)

var (
	acceptStart = []byte("GET " + acceptPath + "?id=")
	headersEnd  = []byte("\r\n\r\n")
)

// prefetch looks for the ids of pipelined requests in what was received, and
// has the set bring their places near while the first is parsed. A guess at what
// follows: those who answer parse for themselves. For a single request it does
// nothing: finding its id costs what waiting for its place does.
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
	set.Prefetch(ids[:n])
}
