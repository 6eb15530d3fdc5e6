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
	s := newSigner(key)
	const want = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
	for range 2 { // a signer is used again
		got := string(s.signature("msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, []byte(`{"test": 2432232314}`)))
		if got != want {
			t.Fatalf("signature %s, want %s", got, want)
		}
	}
}

// verifyWebhook is a receiver's check, written apart from signer.
func verifyWebhook(key []byte, id, timestamp, signature, body string) bool {
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(strings.Join([]string{id, timestamp, body}, ".")))
	return signature == "v1,"+base64.StdEncoding.EncodeToString(mac.Sum(nil))
}

func TestWebhookSecretForms(t *testing.T) {
	const raw = "0123456789abcdef01234567"
	encoded := base64.StdEncoding.EncodeToString([]byte(raw))
	for _, tc := range []struct{ secret, key string }{
		{raw, raw},
		{raw + "\n", raw},
		{"whsec_" + encoded, raw},
		{" whsec_" + encoded + "\r\n", raw},
		{encoded, encoded}, // without the prefix the bytes are the key
	} {
		key, err := parseSecret([]byte(tc.secret))
		if err != nil || string(key) != tc.key {
			t.Errorf("parseSecret(%q) = %q, %v, want %q", tc.secret, key, err, tc.key)
		}
	}
	for _, secret := range []string{"", "\n", "tooshort", "whsec_", "whsec_c2hvcnQ=", "whsec_not base64 but long enough to be one"} {
		if _, err := parseSecret([]byte(secret)); err == nil {
			t.Errorf("parseSecret(%q) took it", secret)
		} else if len(secret) > 8 && strings.Contains(err.Error(), secret[6:]) {
			t.Errorf("error quotes the secret: %v", err)
		}
	}
}
