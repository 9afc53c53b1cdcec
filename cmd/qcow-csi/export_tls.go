package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/pflag"
	"k8s.io/klog/v2"
)

// tlsFlags say whether clients can, or must, use TLS.
type tlsFlags struct {
	certificates string
	mode         choice
	verifyPeer   bool
}

func (f *tlsFlags) addFlags(flags *pflag.FlagSet) {
	f.mode = choice{"required", []string{"on", "required"}}
	flags.StringVar(&f.certificates, "tls-certificates", "", "directory with ca-cert.pem, server-cert.pem and server-key.pem, for TLS")
	flags.Var(&f.mode, "tls", "whether clients must use TLS: required, or on, which leaves it to them")
	flags.BoolVar(&f.verifyPeer, "tls-verify-peer", true, "demand a certificate of each client that uses TLS, from the authority in ca-cert.pem")
}

// check refuses flags that would have no effect: somebody may rely on it.
func (f *tlsFlags) check(flags *pflag.FlagSet) error {
	if !f.enabled() && slices.ContainsFunc([]string{"tls", "tls-verify-peer", "tls-certificates"}, flags.Changed) {
		return errors.New("--tls and --tls-verify-peer need --tls-certificates, which names a directory")
	}
	return nil
}

func (f *tlsFlags) enabled() bool  { return f.certificates != "" }
func (f *tlsFlags) optional() bool { return f.mode.value == "on" }

// config returns what the server's side of TLS needs; nil without TLS.
func (f *tlsFlags) config(ctx context.Context) (*tls.Config, error) {
	if !f.enabled() {
		return nil, nil
	}
	c := &credentials{dir: f.certificates, verifyPeer: f.verifyPeer, logger: klog.FromContext(ctx)}
	if _, err := c.current(); err != nil {
		return nil, fmt.Errorf("--tls-certificates: %w", err)
	}
	return &tls.Config{
		MinVersion:         tls.VersionTLS12,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return c.current() },
	}, nil
}
