package pool

import (
	"crypto/rand"
	"encoding/base32"
	"strings"
)

const (
	maxIDLength  = 64 // bytes; with a pool id and a slash still within the 128 bytes of a CSI field
	maxSlug      = 48
	randomLength = 12 // letters of 5 bits each
)

// ValidID reports whether s has the form of a volume id or a pool id: 1 to 64 characters of a-z, 0-9 and '-', the first
// and the last of them not '-'. Such a string is one harmless path element, and a valid value of a Kubernetes label as
// long as it stays below 64 characters, which every id made here does.
func ValidID(s string) bool {
	if len(s) == 0 || len(s) > maxIDLength || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

// newPoolID returns a random pool id.
func newPoolID() string { return randomLetters() }

// newVolumeID returns an id that shows the name, as far as it can, and has never been used before.
func newVolumeID(name string) string {
	var b strings.Builder
	for _, r := range strings.ToLower(name) {
		switch {
		case b.Len() == maxSlug:
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9':
			b.WriteByte(byte(r))
		case b.Len() > 0 && !strings.HasSuffix(b.String(), "-"):
			b.WriteByte('-')
		}
	}
	slug := strings.TrimSuffix(b.String(), "-")
	if slug == "" {
		slug = "volume"
	}
	return slug + "-" + randomLetters()
}

func randomLetters() string {
	b := make([]byte, 8)
	rand.Read(b) // never fails
	return strings.ToLower(base32.StdEncoding.EncodeToString(b))[:randomLength]
}
