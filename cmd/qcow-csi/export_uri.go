package main

import (
	"net"
	"net/url"
	"path/filepath"
	"strings"
)

// exportURI returns the URI that clients of an export need, in the form of the NBD URI specification.
func exportURI(addr net.Addr, export string, secure bool) (string, error) {
	u := url.URL{Scheme: "nbd", Path: "/" + export}
	if secure {
		u.Scheme = "nbds"
	}
	if addr.Network() != "unix" {
		u.Host = addr.String()
		return u.String(), nil
	}
	path := addr.String()
	if !strings.HasPrefix(path, "@") { // the name of a socket that is in no file system, from systemd
		var err error
		if path, err = filepath.Abs(path); err != nil {
			return "", err
		}
	}
	u.Scheme += "+unix"
	u.RawQuery = "socket=" + strings.NewReplacer("%2F", "/", "+", "%20").Replace(url.QueryEscape(path))
	return u.String(), nil
}
