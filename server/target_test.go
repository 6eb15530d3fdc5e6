package server

import (
	"bytes"
	"net/url"
	"reflect"
	"strconv"
	"strings"
	"testing"

	"verve/dedup"
)

// targets seed the fuzzers: the common query and what stands around it.
var targets = []string{
	"id=42", "id=", "id", "", "id=a&id=b", "id=%41", "id=+1", "id=a%2", "id=3f333df6-90a4-4fda-8dd3-9485d27cee36",
	"id=1&endpoint=http%3A%2F%2Fx.example.com%2F", "%69d=1", "id=1;x=2", "&&id=1", "id=a=b", "id=\xff", "id=%C3%A9", "x=1&id=2",
	"id=1&key=k&token=t", "id=1&key=", "id=1&token=%00", "id=1&%6bey=a&key=b", "token=a;b&id=1", "id=1&key=%C3%A9+x&token=%22t%22", "key=k", "id=1&token=t&token=t",
	"id=1&token=t&key=k", "id=1&token=t&key=", "id=1&key=k&x=1", "id=1&key=k&", "key=k&id=1&token=t",
}

// FuzzPlainQueryAgreesWithParseQuery: the fast path takes nothing that the slow
// one refuses or reads otherwise.
func FuzzPlainQueryAgreesWithParseQuery(f *testing.F) {
	for _, s := range targets {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		var o dedup.Options
		id, ok := plainQuery(raw, &o)
		if !ok {
			return
		}
		slow, err := parseQuery(raw, true)
		fast := query{id: id, key: o.Under, token: o.Token}
		if err != nil || !reflect.DeepEqual(fast, slow) {
			t.Errorf("%q: plainQuery says %+v, parseQuery %+v, %v", raw, fast, slow, err)
		}
	})
}

// TestPlainQueryTakesKeysAndTokens of plain bytes, in both orders and up to their longest.
func TestPlainQueryTakesKeysAndTokens(t *testing.T) {
	longKey, longToken := strings.Repeat("k", maxKeyLen), strings.Repeat("t", maxTokenLen)
	for _, tt := range []struct {
		raw            string
		id, key, token string // no id: it is not taken
	}{
		{"id=1", "1", "", ""},
		{"id=1&key=k", "1", "k", ""},
		{"id=1&token=t", "1", "", "t"},
		{"id=1&key=k&token=t", "1", "k", "t"},
		{"id=1&token=t&key=k", "1", "k", "t"},
		{"id=1&key=" + longKey + "&token=" + longToken, "1", longKey, longToken},
		{raw: "id=1&key=" + longKey + "k"},
		{raw: "id=1&token=" + longToken + "t"},
		{raw: "key=k&id=1"},
		{raw: "id=1&key=k&key=k"},
		{raw: "id=1&token=t&key=k&token=t"},
		{raw: "id=1&key="},
		{raw: "id=1&key=&token=t"},
		{raw: "id=1&token=t&"},
		{raw: "id=1&key=%6b"},
		{raw: "id=1&key=k&x=1"},
		{raw: "id=1&key"},
		{raw: "id=&key=k"},
	} {
		var o dedup.Options
		id, ok := plainQuery([]byte(tt.raw), &o)
		if ok != (tt.id != "") || ok && (string(id) != tt.id || string(o.Under) != tt.key || string(o.Token) != tt.token) {
			t.Errorf("%q: got %q, %q, %q, %t", tt.raw, id, o.Under, o.Token, ok)
		}
	}
}

// FuzzParseQueryAgreesWithNetURL: where both accept a query, they read the
// same id, endpoint, key and token in it.
func FuzzParseQueryAgreesWithNetURL(f *testing.F) {
	for _, s := range targets {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		before := bytes.Clone(raw)
		ours, err := parseQuery(raw, true)
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
