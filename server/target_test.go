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
	"id=1&key=k&token=t", "id=1&key=", "id=1&token=%00", "id=1&%6bey=a&key=b", "token=a;b&id=1", "id=1&key=%C3%A9+x&token=%22t%22", "key=k", "id=1&token=t&token=t",
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
		slow, err := parseQuery(raw, nil, true)
		if err != nil || !bytes.Equal(fast, slow.id) || slow.endpoint != nil || slow.key != nil || slow.token != nil {
			t.Errorf("%q: plainID says %q, parseQuery %+v, %v", raw, fast, slow, err)
		}
	})
}

// FuzzParseQueryAgreesWithNetURL: where both accept a query, they read the
// same id, endpoint, key and token in it.
func FuzzParseQueryAgreesWithNetURL(f *testing.F) {
	for _, s := range targets {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		before := bytes.Clone(raw)
		ours, err := parseQuery(raw, nil, true)
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
		for name, ours := range map[string][]byte{"endpoint": ours.endpoint, "key": ours.key, "token": ours.token} {
			if got := theirs[name]; len(got) > 1 || len(got) == 1 && got[0] != string(ours) || len(got) == 0 && ours != nil {
				t.Errorf("%q: %s is %q to us, %q to net/url", raw, name, ours, got)
			}
		}
		if ours.key != nil && !validKey(ours.key) || ours.token != nil && !validToken(ours.token) {
			t.Errorf("%q: key %q, token %q", raw, ours.key, ours.token)
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
