package callback

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"strings"
	"testing"
)

// The vector of the Standard Webhooks reference libraries.
func TestWebhookSignatureMatchesPublishedVector(t *testing.T) {
	key, err := parseSecret([]byte("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"))
	if err != nil {
		t.Fatal(err)
	}
	const want = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
	got := signature(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", []byte(`{"test": 2432232314}`))
	if got != want {
		t.Fatalf("signature %s, want %s", got, want)
	}
}

// verifyWebhook is a receiver's check, written apart from signature.
func verifyWebhook(key []byte, id, timestamp, signature, body string) bool {
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(strings.Join([]string{id, timestamp, body}, ".")))
	return signature == "v1,"+base64.StdEncoding.EncodeToString(mac.Sum(nil))
}

// referenceKeys are what the reference libraries take for the key in a secret, as
// it would be pasted into their constructor: the strict decoder of Go, Java, Rust
// and JavaScript, and the one of Python, which skips what is not in the alphabet.
func referenceKeys(secret string) (strict, lenient string, ok bool) {
	secret = strings.TrimPrefix(secret, "whsec_")
	key, err := base64.StdEncoding.DecodeString(secret)
	if err != nil {
		return "", "", false
	}
	kept := strings.Map(func(r rune) rune {
		if r == '=' || strings.ContainsRune("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/", r) {
			return r
		}
		return -1
	}, secret)
	skipping, err := base64.StdEncoding.DecodeString(kept)
	return string(key), string(skipping), err == nil
}

// TestEachFormOfASecretVerifiesOrIsRefused: a secret that is taken signs with the
// key that the reference libraries have.
func TestEachFormOfASecretVerifiesOrIsRefused(t *testing.T) {
	raw := []byte("\xfb\xff\xfe0123456789abcdef0123456789abc") // has + and / in base64
	encoded := base64.StdEncoding.EncodeToString(raw)
	taken := 0
	for _, c := range []struct {
		secret string
		take   bool
	}{
		{encoded, true},
		{"whsec_" + encoded, true},
		{"whsec_" + encoded + "\n", true},
		{encoded + "\r\n", true},
		{" \t" + encoded + " \n\n", true},
		{"\ufeffwhsec_" + encoded + "\r\n", true},
		{strings.Repeat("0123456789abcdef", 4), true}, // hexadecimal is base64 to everybody
		{base64.StdEncoding.EncodeToString(raw[:24]), true},
		{base64.StdEncoding.EncodeToString([]byte(strings.Repeat("x", 64))), true},

		{base64.StdEncoding.EncodeToString([]byte(strings.Repeat("x", 65))), false},
		{base64.StdEncoding.EncodeToString(raw[:23]), false},
		{strings.TrimRight(encoded, "="), false},
		{base64.URLEncoding.EncodeToString(raw), false},
		{"whsec_" + base64.URLEncoding.EncodeToString(raw), false},
		{`"whsec_` + encoded + `"`, false},
		{"'" + encoded + "'", false},
		{"WHSEC_" + encoded, false},
		{"whsec_whsec_" + encoded, false},
		{"whpk_" + encoded, false},
		{"whsec_ " + encoded, false},
		{encoded[:20] + "\n" + encoded[20:], false},
		{encoded + " " + encoded, false},
		{"SECRET=" + encoded, false},
		{encoded + "==", false},
		{"0123456789abcdef01234567", false}, // 18 bytes to everybody
		{"correct horse battery staple, and then some", false},
		{"signing-s3cret-0123456789-0123456789", false},
		{"\xff\xfew\x00h\x00s\x00", false},
		{"whsec_c2hvcnQ=", false},
		{"whsec_", false},
		{"\ufeff\n", false},
		{"", false},
	} {
		key, err := parseSecret([]byte(c.secret))
		if (err == nil) != c.take {
			t.Errorf("parseSecret(%q): %v, want taken %v", c.secret, err, c.take)
		}
		if err != nil {
			if part := strings.TrimSpace(c.secret); len(part) > 16 && strings.Contains(err.Error(), part[8:16]) {
				t.Errorf("the error quotes the secret: %v", err)
			}
			continue
		}
		taken++
		pasted := strings.TrimSpace(strings.TrimPrefix(c.secret, "\ufeff"))
		strict, lenient, ok := referenceKeys(pasted)
		if !ok || strict != string(key) || lenient != string(key) {
			t.Errorf("%q: the key is %q; the libraries have %q and %q", c.secret, key, strict, lenient)
		}
	}
	if taken != 9 {
		t.Errorf("%d forms were taken, want 9", taken)
	}
}
