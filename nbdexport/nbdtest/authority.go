package nbdtest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// Authority is a certificate authority of a test, with a certificate of a server, "localhost", and one of a client.
type Authority struct {
	Pool         *x509.CertPool
	Server, User tls.Certificate
	certificate  *x509.Certificate
	key          *ecdsa.PrivateKey
	tb           testing.TB
}

// NewAuthority makes an authority that is good for an hour.
func NewAuthority(tb testing.TB) *Authority {
	tb.Helper()
	a := &Authority{Pool: x509.NewCertPool(), tb: tb}
	root := &x509.Certificate{
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, Subject: pkix.Name{CommonName: "authority"},
	}
	a.certificate = root // signs itself
	made := a.issue(root)
	a.certificate = made.Leaf
	a.Pool.AddCert(a.certificate)
	a.Server = a.issue(&x509.Certificate{
		Subject: pkix.Name{CommonName: "localhost"}, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	a.User = a.issue(&x509.Certificate{
		Subject: pkix.Name{CommonName: "user"}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	return a
}

// issue makes a certificate with a key of its own. The first one is the authority's.
func (a *Authority) issue(c *x509.Certificate) tls.Certificate {
	a.tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.tb.Fatal(err)
	}
	if a.key == nil {
		a.key = key
	}
	c.SerialNumber, c.NotBefore, c.NotAfter = big.NewInt(time.Now().UnixNano()), time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, c, a.certificate, &key.PublicKey, a.key)
	if err != nil {
		a.tb.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		a.tb.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

// Client is the configuration of a client that trusts the authority, with one version of TLS, or with any if that is 0.
func (a *Authority) Client(version uint16) *tls.Config {
	return &tls.Config{
		RootCAs: a.Pool, ServerName: "localhost", MinVersion: max(version, tls.VersionTLS12), MaxVersion: version,
	}
}

// WriteFiles writes the authority's certificate and the user's with its key to a directory, under the names that libnbd and
// QEMU look for: ca-cert.pem, client-cert.pem, client-key.pem.
func (a *Authority) WriteFiles(dir string) {
	a.tb.Helper()
	key, err := x509.MarshalPKCS8PrivateKey(a.User.PrivateKey)
	write := func(name, kind string, der []byte) error {
		return os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
	}
	if err := errors.Join(
		err,
		write("ca-cert.pem", "CERTIFICATE", a.certificate.Raw),
		write("client-cert.pem", "CERTIFICATE", a.User.Leaf.Raw),
		write("client-key.pem", "PRIVATE KEY", key),
	); err != nil {
		a.tb.Fatal(err)
	}
}
