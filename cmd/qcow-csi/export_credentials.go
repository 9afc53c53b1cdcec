package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"k8s.io/klog/v2"
)

// The files of a directory with certificates are called as those of QEMU and of libnbd.
const (
	authorityFile   = "ca-cert.pem"
	revocationFile  = "ca-crl.pem" // need not be there
	certificateFile = "server-cert.pem"
	keyFile         = "server-key.pem"
)

// credentials are what a directory with certificates holds: read again when it has changed.
type credentials struct {
	dir        string
	verifyPeer bool
	logger     klog.Logger

	mu     sync.Mutex
	config *tls.Config
	state  []fs.FileInfo // of the files when they were read, nil for one that was not there
}

// current returns the configuration for a client that connects now. Where the files are bad, or only some of them are new yet, those that
// were read before hold on.
func (c *credentials) current() (*tls.Config, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	state := c.look()
	if c.config != nil && slices.EqualFunc(c.state, state, sameFile) {
		return c.config, nil
	}
	config, err := c.load()
	switch {
	case err == nil:
		if c.config != nil {
			c.logger.Info("Certificates were read again", "directory", c.dir)
		}
		c.config, c.state = config, state
	case c.config == nil:
		return nil, err
	default:
		c.logger.Error(err, "New certificates can't be used; the old ones hold on", "directory", c.dir)
	}
	return c.config, nil
}

// look returns what can be seen of the files from outside.
func (c *credentials) look() (state []fs.FileInfo) {
	for _, name := range []string{authorityFile, revocationFile, certificateFile, keyFile} {
		info, err := os.Stat(filepath.Join(c.dir, name))
		if err != nil {
			info = nil
		}
		state = append(state, info)
	}
	return state
}

func sameFile(a, b fs.FileInfo) bool {
	if a == nil || b == nil {
		return a == b
	}
	return os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime())
}

// load reads the files.
func (c *credentials) load() (*tls.Config, error) {
	own, err := tls.LoadX509KeyPair(filepath.Join(c.dir, certificateFile), filepath.Join(c.dir, keyFile))
	if err != nil {
		return nil, err
	}
	config := &tls.Config{
		MinVersion:             tls.VersionTLS12,
		Certificates:           []tls.Certificate{own},
		SessionTicketsDisabled: true, // a client that comes back is verified as a new one is
	}
	if !c.verifyPeer {
		return config, nil
	}
	authorities, err := readAuthorities(filepath.Join(c.dir, authorityFile))
	if err != nil {
		return nil, fmt.Errorf("%w (clients are verified by it; --tls-verify-peer=false serves any client)", err)
	}
	config.ClientAuth, config.ClientCAs = tls.RequireAndVerifyClientCert, x509.NewCertPool()
	for _, a := range authorities {
		config.ClientCAs.AddCert(a)
	}
	revoked, err := readRevocations(filepath.Join(c.dir, revocationFile), authorities)
	if err != nil {
		return nil, err
	}
	config.VerifyConnection = revoked.verify
	return config, nil
}

// readAuthorities reads certificates that others are verified by.
func readAuthorities(path string) (authorities []*x509.Certificate, err error) {
	err = readPEM(path, "CERTIFICATE", func(der []byte) error {
		a, err := x509.ParseCertificate(der)
		authorities = append(authorities, a)
		return err
	})
	return authorities, err
}

// revocations are the lists of certificates that authorities have taken back.
type revocations []*x509.RevocationList

// readRevocations reads the lists of the authorities. Without the file there are none.
func readRevocations(path string, authorities []*x509.Certificate) (revoked revocations, err error) {
	err = readPEM(path, "X509 CRL", func(der []byte) error {
		list, err := x509.ParseRevocationList(der)
		if err != nil {
			return err
		}
		signed := func(a *x509.Certificate) bool { return list.CheckSignatureFrom(a) == nil }
		if !slices.ContainsFunc(authorities, signed) {
			return fmt.Errorf("the list is from none of the authorities in %s", authorityFile)
		}
		revoked = append(revoked, list)
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return revoked, err
}

// verify refuses a client whose certificate was taken back, and, as QEMU does, every client of an authority whose list is out of date.
func (r revocations) verify(state tls.ConnectionState) error {
	for _, chain := range state.VerifiedChains {
		for _, c := range chain {
			if err := r.verifyCertificate(c); err != nil {
				return err
			}
		}
	}
	return nil
}

func (r revocations) verifyCertificate(c *x509.Certificate) error {
	for _, list := range r {
		if string(list.RawIssuer) != string(c.RawIssuer) {
			continue
		}
		if !list.NextUpdate.IsZero() && time.Now().After(list.NextUpdate) {
			return fmt.Errorf("%s is out of date since %v", revocationFile, list.NextUpdate)
		}
		for _, entry := range list.RevokedCertificateEntries {
			if entry.SerialNumber.Cmp(c.SerialNumber) == 0 {
				return fmt.Errorf("the certificate with serial number %v was taken back", c.SerialNumber)
			}
		}
	}
	return nil
}

// readPEM calls take with each block of this kind in a file, which has at least one.
func readPEM(path, kind string, take func(der []byte) error) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	found := false
	for block, rest := pem.Decode(b); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != kind {
			continue
		}
		found = true
		if err := take(block.Bytes); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	if !found {
		return fmt.Errorf("%s: there is no %s in it", path, kind)
	}
	return nil
}
