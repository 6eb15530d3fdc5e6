package server

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/valyala/fasthttp"
)

// bodyCase is a body in chunks, what it holds if it is well formed, and what follows it.
type bodyCase struct {
	name, raw string
	body      string
	refused   bool
}

func bodyCases() []bodyCase {
	a := strings.Repeat
	five := func(extension string) string { return "5" + extension + "\r\nhello\r\n0\r\n\r\n" }
	last := func(extension string) string { return "5\r\nhello\r\n0" + extension + "\r\n\r\n" }
	trailer := func(fields string) string { return "5\r\nhello\r\n0\r\n" + fields + "\r\n" }
	return []bodyCase{
		{"no extension", five(""), "hello", false},
		{"no data", "0\r\n\r\n", "", false},
		{"several chunks", "1\r\na\r\n0003\r\nbcd\r\n0A\r\n0123456789\r\na\r\n0123456789\r\n000\r\n\r\n", "abcd01234567890123456789", false},
		{"a name", five(";a"), "hello", false},
		{"a name and a token", five(";a=b"), "hello", false},
		{"a name and a string", five(`;a="b c;d=\"\\\é` + "\t" + `"`), "hello", false},
		{"an empty string", five(`;a=""`), "hello", false},
		{"several", five(`;a;b=c;d="e"`), "hello", false},
		{"all bytes of a token", five(";!#$%&'*+-.^_`|~09azAZ=!#$%&'*+-.^_`|~09azAZ"), "hello", false},
		{"space within", five("; \ta \t= \tb \t; c"), "hello", false},
		{"behind the last chunk", last(";a=b"), "hello", false},
		{"as long as may be", five(";" + a("a", maxChunkLine-4)), "hello", false},
		{"a trailer", trailer("X: y\r\nEmpty:\r\nZ:\tv w\t\r\n"), "hello", false},
		{"a trailer as long as may be", trailer("X: " + a("y", maxTrailer-7) + "\r\n"), "hello", false},

		{"nothing behind the semicolon", five(";"), "", true},
		{"nothing behind the second one", five(";a;"), "", true},
		{"two semicolons", five(";;a"), "", true},
		{"a space behind the semicolon", five("; "), "", true},
		{"a space", five(" "), "", true},
		{"a tab", five("\t"), "", true},
		{"a space before the semicolon", five(" ;a"), "", true},
		{"a space at the end", five(";a "), "", true},
		{"a space behind the value", five(";a=b "), "", true},
		{"a space before the size", " " + five(""), "", true},
		{"no name", five(";=b"), "", true},
		{"no value", five(";a="), "", true},
		{"two values", five(";a=b=c"), "", true},
		{"a value behind a string", five(`;a="b"c`), "", true},
		{"a string that does not end", five(`;a="b`), "", true},
		{"a string that ends in its escape", five(`;a="b\"`), "", true},
		{"a string as a name", five(`;"a"`), "", true},
		{"a bracket", five(";[a]"), "", true},
		{"a letter of two bytes", five(";é"), "", true},
		{"a comma", five(";a,b"), "", true},
		{"NUL", five(";a\x00"), "", true},
		{"NUL in a string", five(";a=\"\x00\""), "", true},
		{"NUL behind an escape", five(";a=\"\\\x00\""), "", true},
		{"DEL", five(";a\x7f"), "", true},
		{"ESC", five(";a=\"\x1b\""), "", true},
		{"CR", five(";a\rb"), "", true},
		{"two CR", five(";a\r"), "", true},
		{"CR in a string", five(";a=\"\r\""), "", true},
		{"LF", five(";a\nb"), "", true},
		{"LF alone behind a size", "5\nhello\r\n0\r\n\r\n", "", true},
		{"LF alone behind an extension", "5;a\nhello\r\n0\r\n\r\n", "", true},
		{"CR alone behind a size", "5\rhello\r\n0\r\n\r\n", "", true},
		{"too long by one", five(";" + a("a", maxChunkLine-3)), "", true},
		{"far too long", five(";" + a("a", 1<<19)), "", true},
		{"far too long and without an end", "5;" + a("a", 1<<19), "", true},
		{"far too many", five(a(";a", 1<<18)), "", true},
		{"far too much space", five("; " + a(" ", 1<<19) + "a"), "", true},
		{"broken behind the last chunk", last(";"), "", true},
		{"a space behind the last chunk", last(" "), "", true},
		{"no size", five("")[1:], "", true},
		{"no size but an extension", ";a\r\nhello\r\n0\r\n\r\n", "", true},
		{"a negative size", "-5\r\nhello\r\n0\r\n\r\n", "", true},
		{"a size with a sign", "+5\r\nhello\r\n0\r\n\r\n", "", true},
		{"a size with a prefix", "0x5\r\nhello\r\n0\r\n\r\n", "", true},
		{"a size with an underscore", "0_5\r\nhello\r\n0\r\n\r\n", "", true},
		{"a size that overflows", "10000000000000005\r\nhello\r\n0\r\n\r\n", "", true},
		{"a size of many zeros", a("0", 16) + "5\r\nhello\r\n0\r\n\r\n", "", true},
		{"less data than the size", "6\r\nhello\r\n0\r\n\r\n", "", true},
		{"more data than the size", "4\r\nhello\r\n0\r\n\r\n", "", true},
		{"LF alone behind the data", "5\r\nhello\n0\r\n\r\n", "", true},
		{"CR alone behind the data", "5\r\nhello\r0\r\n\r\n", "", true},
		{"nothing behind the data", "5\r\nhello0\r\n\r\n", "", true},

		{"LF alone at the end of a trailer", "5\r\nhello\r\n0\r\n\n", "", true},
		{"LF alone behind a field", trailer("X: y\n"), "", true},
		{"CR alone in a field", trailer("X: y\rz\r\n"), "", true},
		{"a field without a name", trailer(": y\r\n"), "", true},
		{"a field without a colon", trailer("X\r\n"), "", true},
		{"a space in a field's name", trailer("X : y\r\n"), "", true},
		{"a continued field", trailer("X: y\r\n z\r\n"), "", true},
		{"NUL in a field", trailer("X: \x00\r\n"), "", true},
		{"a length in the trailer", trailer("Content-Length: 5\r\n"), "", true},
		{"an encoding in the trailer", trailer("Transfer-Encoding: chunked\r\n"), "", true},
		{"a host in the trailer", trailer("Host: x\r\n"), "", true},
		{"credentials in the trailer", trailer("Authorization: x\r\n"), "", true},
		{"a trailer that is too long by one", trailer("X: " + a("y", maxTrailer-6) + "\r\n"), "", true},
		{"a trailer of many lines", trailer(a("X: y\r\n", maxTrailer/6+1)), "", true},
		{"a trailer without an end", "0\r\n" + a("X: y\r\n", 1<<16), "", true},
	}
}

// pieces gives raw in pieces that end at the places in cuts.
type pieces struct {
	raw  []byte
	at   int
	cuts map[int]bool
}

func (p *pieces) Read(b []byte) (n int, err error) {
	if p.at == len(p.raw) {
		return 0, io.EOF
	}
	for n < len(b) && p.at < len(p.raw) && (n == 0 || !p.cuts[p.at]) {
		b[n] = p.raw[p.at]
		n, p.at = n+1, p.at+1
	}
	return n, nil
}

// readChunks reads the body of a request in chunks as the handlers do, buffer bytes at a
// time, and returns what follows it.
func readChunks(t testing.TB, raw []byte, cuts map[int]bool, buffer int) (body, rest []byte, err error) {
	t.Helper()
	var ctx fasthttp.RequestCtx
	in := bufio.NewReaderSize(&pieces{raw: append([]byte(chunkedBatch), raw...), cuts: cuts}, readBuffer)
	if err := ctx.Request.Header.Read(in); err != nil {
		t.Fatal(err)
	}
	if err := ctx.Request.ContinueReadBodyStream(in, 1<<20, false); err != nil {
		t.Fatal(err)
	}
	stream := bodyOf(&ctx)
	b := make([]byte, buffer)
	for {
		n, err := stream.Read(b)
		body = append(body, b[:n]...)
		if err == io.EOF {
			rest, err = io.ReadAll(in)
			return body, rest, err
		}
		if err != nil {
			return nil, nil, err
		}
	}
}

// TestChunksAreReadAsTheRFCWritesThem, wherever the network cuts them, and whatever
// follows them; and those of the wrong form end in an error.
func TestChunksAreReadAsTheRFCWritesThem(t *testing.T) {
	const next = "GET / HTTP/1.1\r\n\r\n"
	for _, c := range bodyCases() {
		t.Run(c.name, func(t *testing.T) {
			raw := []byte(c.raw + next)
			want := fmt.Sprintf("%q and %q, <nil>", c.body, next)
			for cut := 0; cut < len(raw); cut += 1 + len(raw)/100 {
				for _, buffer := range []int{1, 4096} {
					body, rest, err := readChunks(t, raw, map[int]bool{len(chunkedBatch) + cut: true}, buffer)
					if got := fmt.Sprintf("%q and %q, %v", body, rest, err); c.refused && err == nil || !c.refused && got != want {
						t.Fatalf("cut at %d, %d bytes at a time: got %.200s", cut, buffer, got)
					}
				}
			}
			if body, rest, err := reference(raw); c.refused != (err != nil) || !c.refused && (string(body) != c.body || string(rest) != next) {
				t.Errorf("the reference reads %q and %q, %v", body, rest, err)
			}
		})
	}
}

// TestBadChunksAreRefusedAndCountNothing at every route, and nothing behind them is taken
// for a request.
func TestBadChunksAreRefusedAndCountNothing(t *testing.T) {
	s := newSite(t, nil)
	for _, c := range bodyCases() {
		for _, route := range []string{"POST " + acceptPath, "POST /test", "POST /nowhere", "PUT " + acceptPath, "POST " + acceptPath + "?id=%zz", "GET " + acceptPath + "?id=1"} {
			raw := strings.Replace(chunkedBatch, "POST "+acceptPath, route, 1) + c.raw
			want := map[string]string{"POST /nowhere": "404", "PUT " + acceptPath: "405"}[route]
			if want == "" {
				want = "400"
			}
			if taken := route == "POST /test" || route == "POST "+acceptPath && c.body != ""; !c.refused && taken {
				want = "200 405"
			}
			before := s.cfg.Counter.Stats().Unique
			if got := s.statuses(raw+"GET /test HTTP/1.1\r\nHost: x\r\n\r\n", 0); got != want {
				t.Errorf("%s, %s: got %q, want %q", c.name, route, got, want)
			}
			if n := s.cfg.Counter.Stats().Unique; want != "200 405" && n != before {
				t.Errorf("%s, %s: %d ids were counted", c.name, route, n-before)
			}
		}
	}
}

var (
	chunkLine = func() *regexp.Regexp {
		const token, bws = "[-!#$%&'*+.^_`|~0-9A-Za-z]+", `[ \t]*`
		const quoted = `"(?:[\t !#-\[\]-~\x{80}-\x{10ffff}]|\\[\t -~\x{80}-\x{10ffff}])*"`
		const extension = token + `(?:` + bws + `=` + bws + `(?:` + token + `|` + quoted + `))?`
		return regexp.MustCompile(`^([0-9A-Fa-f]{1,15})(?:;` + bws + extension + `(?:` + bws + `;` + bws + extension + `)*)?$`)
	}()
	trailerLine = regexp.MustCompile("^([-!#$%&'*+.^_`|~0-9A-Za-z]+):[\\t -~\\x{80}-\\x{10ffff}]*$")
)

var errReference = errors.New("refused")

// reference reads a body in chunks in another way: with all of it at hand, and the
// grammar of the RFC as an expression.
func reference(raw []byte) (body, rest []byte, err error) {
	line := func(limit int) (string, bool) {
		before, after, found := bytes.Cut(raw, []byte("\n"))
		cut, crlf := bytes.CutSuffix(before, []byte("\r"))
		raw = after
		return string(cut), found && crlf && len(before)+1 <= limit
	}
	for {
		head, ok := line(maxChunkLine)
		m := chunkLine.FindStringSubmatch(head)
		if !ok || m == nil {
			return nil, nil, errReference
		}
		size, _ := strconv.ParseInt(m[1], 16, 64)
		if size == 0 {
			break
		}
		if int64(len(raw)) < size+2 || string(raw[size:size+2]) != "\r\n" {
			return nil, nil, errReference
		}
		body, raw = append(body, raw[:size]...), raw[size+2:]
	}
	for limit := maxTrailer; ; {
		field, ok := line(limit)
		limit -= len(field) + 2
		switch m := trailerLine.FindStringSubmatch(field); {
		case !ok, field != "" && (m == nil || forbiddenTrailer.MatchString(m[1])):
			return nil, nil, errReference
		case field == "":
			return body, raw, nil
		}
	}
}

// forbiddenTrailer matches the fields that fasthttp refuses in a trailer.
var forbiddenTrailer = regexp.MustCompile("(?i)^(?:authorization|connection|content-(?:encoding|length|range|type)|cookie|expect|host|keep-alive|location|max-forwards|" +
	"proxy-(?:authenticate|authorization|connection)|range|set-cookie|te|trailer|transfer-encoding|www-authenticate|(?:x-forwarded|x-real-ip).*)$")

// FuzzChunks: wherever a body is cut, it is read as the reference reads it in one piece.
func FuzzChunks(f *testing.F) {
	for i, c := range bodyCases() {
		if len(c.raw) < 2<<10 {
			f.Add([]byte(c.raw+"GET "), uint16(i), uint16(2*i), uint8(i))
		}
	}
	f.Fuzz(func(t *testing.T, raw []byte, first, second uint16, buffer uint8) {
		n := len(chunkedBatch)
		body, rest, err := readChunks(t, raw, map[int]bool{n: true, n + int(first): true, n + int(second): true}, 1+int(buffer))
		wantBody, wantRest, wantErr := reference(raw)
		if (err != nil) != (wantErr != nil) || err == nil && (!bytes.Equal(body, wantBody) || !bytes.Equal(rest, wantRest)) {
			t.Errorf("%q: got %q and %q, %v, want %q and %q, %v", raw, body, rest, err, wantBody, wantRest, wantErr)
		}
	})
}
