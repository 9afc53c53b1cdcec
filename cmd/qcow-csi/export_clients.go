package main

import (
	"context"
	"errors"
	"net"
	"time"

	"github.com/spf13/pflag"
	"k8s.io/klog/v2"

	"github.com/qcow-csi/qcow-csi/nbdexport"
)

// clients is what a server grants to its clients.
type clients struct {
	most       int
	persistent bool
	handshake  time.Duration
	grace      time.Duration
}

func (c *clients) addFlags(flags *pflag.FlagSet) {
	flags.IntVarP(&c.most, "max-clients", "e", 16, "clients that are served at a time, others wait; 0: as many as the server has room for, 64 (also --shared)")
	flags.BoolVarP(&c.persistent, "persistent", "t", false, "keep serving when the last client has left")
	flags.DurationVar(&c.handshake, "handshake-timeout", 10*time.Second, "how long a client may take to choose an export")
	flags.DurationVar(&c.grace, "shutdown-grace", 10*time.Second, "how long clients may take, after a signal, to receive their last replies")
}

func (c *clients) check() error {
	switch {
	case c.most < 0:
		return errors.New("--max-clients can't be negative")
	case c.handshake <= 0:
		return errors.New("--handshake-timeout must be more than 0")
	case c.grace < 0:
		return errors.New("--shutdown-grace can't be negative")
	}
	return nil
}

func (c *clients) limit(config *nbdexport.Config) {
	config.MaxConnections, config.HandshakeTimeout = c.most, c.handshake
}

// left is told when a client has left. It calls last when that was the last one and the server is not to wait for others. A client that
// has not chosen an export does not count.
func (c *clients) left(ctx context.Context, d nbdexport.Disconnect, last func()) {
	klog.FromContext(ctx).V(2).Info("Client left", "peer", d.Peer, "export", d.Export, "remaining", d.Remaining, "reason", d.Err)
	if d.Chosen && d.Remaining == 0 && !c.persistent {
		last()
	}
}

// stop ends the server in order, or, when a client does not take its last replies, without that client.
func (c *clients) stop(ctx context.Context, server *nbdexport.Server) error {
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.grace)
	defer cancel()
	err := server.Shutdown(grace)
	if errors.Is(err, context.DeadlineExceeded) {
		klog.FromContext(ctx).Info("A client did not take its last replies", "grace", c.grace)
		return nil
	}
	return err
}

// watched is a listener that logs who connects.
type watched struct {
	net.Listener
	logger klog.Logger
}

// Accept implements net.Listener.
func (w watched) Accept() (net.Conn, error) {
	conn, err := w.Listener.Accept()
	if err == nil {
		w.logger.V(2).Info("Client connected", "peer", conn.RemoteAddr(), "listener", w.Addr())
	}
	return conn, err
}
