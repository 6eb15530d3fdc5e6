package server

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"reflect"
	"strconv"

	"github.com/valyala/fasthttp"
)

const (
	// inChunks is fasthttp's content length of a body in chunks.
	inChunks = -1

	// maxChunkLine bounds the line before a chunk, in bytes: its size and its extensions,
	// which no caller is known to send. maxTrailer bounds the fields after the last chunk.
	// Both apply in addition to the headers, which may fill readBuffer.
	maxChunkLine = 256
	maxTrailer   = 1 << 10

	// maxSizeDigits is how many hexadecimal digits fasthttp reads.
	maxSizeDigits = 15
)

var errBadChunks = errors.New("the body has badly formed chunks")

// chunks reads a body in chunks, and returns errBadChunks if the body does not follow RFC
// 9112, section 7.1. fasthttp reads the same bytes afterwards, but it skips an
// extension without a check, allows spaces after a size, and bounds neither. So each line
// and the trailer are checked while they are still in fasthttp's buffer.
//
// Whitespace around the parts of an extension is allowed (BWS in the RFC), but not directly
// after the size: fasthttp refuses it there.
type chunks struct {
	stream io.Reader     // fasthttp's
	ahead  *bufio.Reader // what stream reads from
	left   int           // of the chunk that is being read
}

// bodyOf returns the body of a request, or nil if it has none.
func bodyOf(ctx *fasthttp.RequestCtx) io.Reader {
	stream := ctx.RequestBodyStream()
	if stream == nil || ctx.Request.Header.ContentLength() != inChunks {
		return stream
	}
	// fasthttp does not export its buffer. If the field is gone the test of chunks fails, and
	// a request with a body in chunks panics and gets 500.
	field := reflect.ValueOf(stream).Elem().FieldByName("reader")
	if field.Type() != reflect.TypeFor[*bufio.Reader]() {
		panic("server: fasthttp's stream has no reader")
	}
	return &chunks{stream: stream, ahead: (*bufio.Reader)(field.UnsafePointer())}
}

// Read implements io.Reader.
func (c *chunks) Read(p []byte) (int, error) {
	if c.left == 0 && len(p) > 0 {
		line, err := c.line(0, maxChunkLine)
		if err != nil {
			return 0, err
		}
		size, ok := chunkSize(line)
		if !ok {
			return 0, errBadChunks
		}
		if c.left = size; size == 0 {
			if err := c.checkTrailer(len(line) + len("\r\n")); err != nil {
				return 0, err
			}
		}
	}
	n, err := c.stream.Read(p)
	c.left -= n
	return n, err
}

// line returns the line that begins after the first skip bytes, without the CRLF at its
// end. With it the line has limit bytes at most. It takes nothing out of ahead.
func (c *chunks) line(skip, limit int) ([]byte, error) {
	for seen := skip; ; {
		b, err := c.ahead.Peek(max(c.ahead.Buffered(), seen+1)) // waits if all is seen
		if err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
		b = b[skip:min(len(b), skip+limit)]
		if end := bytes.IndexByte(b, '\n'); end > 0 && b[end-1] == '\r' {
			return b[:end-1], nil
		} else if end >= 0 || len(b) == limit {
			return nil, errBadChunks
		}
		seen = skip + len(b)
	}
}

// checkTrailer checks the lines from at until an empty one.
func (c *chunks) checkTrailer(at int) error {
	for limit := maxTrailer; ; {
		line, err := c.line(at, limit)
		if err != nil || len(line) == 0 {
			return err
		}
		name, value, found := bytes.Cut(line, []byte(":"))
		if !found || len(name) == 0 || lengthOf(name, &tokenBytes) < len(name) || lengthOf(value, &fieldBytes) < len(value) {
			return errBadChunks
		}
		at += len(line) + len("\r\n")
		limit -= len(line) + len("\r\n")
	}
}

// chunkSize returns the size in the line before a chunk, if the line is well formed:
//
//	1*HEXDIG *( BWS ";" BWS token [ BWS "=" BWS ( token / quoted-string ) ] )
func chunkSize(line []byte) (size int, ok bool) {
	n := lengthOf(line, &hexBytes)
	if n == 0 || n > maxSizeDigits {
		return 0, false
	}
	value, _ := strconv.ParseInt(string(line[:n]), 16, 64) // it fits: there are maxSizeDigits at most
	for line = line[n:]; len(line) > 0; {
		if line[0] != ';' {
			return 0, false
		}
		line = skipSpace(line[1:])
		if n = lengthOf(line, &tokenBytes); n == 0 {
			return 0, false
		}
		after := line[n:]
		line = skipSpace(after)
		if len(line) > 0 && line[0] == '=' {
			line = skipSpace(line[1:])
			if n = max(lengthOf(line, &tokenBytes), lengthOfQuoted(line)); n == 0 {
				return 0, false
			}
			after = line[n:]
			line = skipSpace(after)
		}
		if len(line) == 0 && len(after) > 0 {
			return 0, false // space at the end
		}
	}
	return int(value), true
}

func skipSpace(b []byte) []byte { return bytes.TrimLeft(b, " \t") }

// lengthOfQuoted returns the length of the quoted-string (RFC 9110, section 5.6.4) that b
// begins with, or 0.
func lengthOfQuoted(b []byte) int {
	if len(b) == 0 || b[0] != '"' {
		return 0
	}
	for i := 1; i < len(b); i++ {
		switch {
		case b[i] == '"':
			return i + 1
		case b[i] == '\\':
			i++
		}
		if i < len(b) && !fieldBytes[b[i]] {
			return 0
		}
	}
	return 0
}

// tokenBytes are those of a token (RFC 9110, section 5.6.2), fieldBytes those of a field's
// value and of a quoted-string, hexBytes those of a size.
var (
	tokenBytes = setOf("!#-'*+.0-9A-Z^-z|~-")
	fieldBytes = setOf("\t -~\x80-\xff")
	hexBytes   = setOf("0-9A-Fa-f")
)
