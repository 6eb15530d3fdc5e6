package callback

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"strconv"
	"time"

	"github.com/valyala/fasthttp"

	"verve/internal/setting"
)

// The length of a webhook key in bytes, as the Standard Webhooks specification has
// it.
const minSecret, maxSecret = 24, 64

// parseSecret returns the key in a webhook secret: base64 in the alphabet with +
// and /, with its padding, with or without whsec_ before it. Every reference library
// decodes this form to the same key. Another form, which some of them decode to
// other bytes, is refused: the receiver would refuse each POST.
//
// Space, line ends and a byte order mark around it are ignored, because editors leave
// them in a file. Errors do not quote the secret.
func parseSecret(secret []byte) ([]byte, error) {
	encoded := bytes.TrimSpace(bytes.TrimPrefix(bytes.TrimSpace(secret), []byte("\ufeff")))
	encoded = bytes.TrimPrefix(encoded, []byte("whsec_"))
	key := make([]byte, base64.StdEncoding.DecodedLen(len(encoded)))
	n, err := base64.StdEncoding.Strict().Decode(key, encoded)
	if err != nil || bytes.ContainsAny(encoded, "\r\n") || n < minSecret || n > maxSecret {
		return nil, setting.Errorf("callback-secret-file", "want %d to %d bytes in base64 (with + and / and with its padding), with or without whsec_ before them and nothing else in the file, as from: openssl rand -base64 32", minSecret, maxSecret)
	}
	return key[:n], nil
}

// signature returns the value of webhook-signature by the Standard Webhooks scheme,
// version 1: HMAC-SHA256 over "id.timestamp.body".
func signature(key []byte, id, timestamp string, body []byte) string {
	mac := hmac.New(sha256.New, key)
	fmt.Fprintf(mac, "%s.%s.%s", id, timestamp, body)
	return "v1," + base64.StdEncoding.EncodeToString(mac.Sum(nil))
}

// sign sets the three headers of a message. The id is new: receivers use it to
// recognise a message that reaches them twice.
func sign(h *fasthttp.RequestHeader, key []byte, now time.Time, body []byte) {
	id, timestamp := "msg_"+rand.Text(), strconv.FormatInt(now.Unix(), 10)
	h.Set("webhook-id", id)
	h.Set("webhook-timestamp", timestamp)
	h.Set("webhook-signature", signature(key, id, timestamp, body))
}
