package server

import (
	"bytes"
	"net/url"
	"strconv"
	"testing"
)

// targets seed the fuzzers: the common query and what stands around it.
var targets = []string{
	"id=42", "id=", "id", "", "id=a&id=b", "id=%41", "id=+1", "id=a%2", "id=3f333df6-90a4-4fda-8dd3-9485d27cee36",
	"id=1&endpoint=http%3A%2F%2Fx.example.com%2F", "%69d=1", "id=1;x=2", "&&id=1", "id=a=b", "id=\xff", "id=%C3%A9", "x=1&id=2",
}

// FuzzPlainIDAgreesWithParseQuery: the fast path takes nothing that the slow
// one refuses or reads otherwise.
func FuzzPlainIDAgreesWithParseQuery(f *testing.F) {
	for _, s := range targets {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		fast, ok := plainID(raw)
		if !ok {
			return
		}
		slow, err := parseQuery(raw, nil)
		if err != nil || !bytes.Equal(fast, slow.id) || slow.endpoint != nil {
			t.Errorf("%q: plainID says %q, parseQuery %+v, %v", raw, fast, slow, err)
		}
	})
}

// FuzzParseQueryAgreesWithNetURL: where both accept a query, they read the
// same id and endpoint in it.
func FuzzParseQueryAgreesWithNetURL(f *testing.F) {
	for _, s := range targets {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		before := bytes.Clone(raw)
		ours, err := parseQuery(raw, nil)
		if !bytes.Equal(before, raw) {
			t.Errorf("%q was changed to %q", before, raw)
		}
		if err != nil {
			return
		}
		theirs, err := url.ParseQuery(string(raw))
		if err != nil {
			return // a pair that we ignore
		}
		if got := theirs["id"]; len(got) != 1 || got[0] != string(ours.id) {
			t.Errorf("%q: id is %q to us, %q to net/url", raw, ours.id, got)
		}
		if got := theirs["endpoint"]; len(got) > 1 || len(got) == 1 && got[0] != string(ours.endpoint) || len(got) == 0 && ours.endpoint != nil {
			t.Errorf("%q: endpoint is %q to us, %q to net/url", raw, ours.endpoint, got)
		}
	})
}

// FuzzCanonicalUint64AgreesWithStrconv: what it takes, strconv prints the same.
func FuzzCanonicalUint64AgreesWithStrconv(f *testing.F) {
	for _, s := range []string{"0", "00", "42", "+1", "18446744073709551615", "18446744073709551616", "99999999999999999999", "1_0"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, id []byte) {
		n, err := strconv.ParseUint(string(id), 10, 64)
		want := err == nil && strconv.FormatUint(n, 10) == string(id)
		if got := canonicalUint64(id); got != want {
			t.Errorf("%q: got %v, want %v", id, got, want)
		}
	})
}
