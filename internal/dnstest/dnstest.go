// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Package dnstest is a DNS server for tests. It offers answers that are late, missing,
// truncated or wrong. Only tests import it.
package dnstest

import (
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
)

// Query is a question as the tests' DNS server gets it.
type Query struct {
	Name    string // lower case, without a trailing dot
	IPv6    bool
	From    string // address of the client's socket
	Network string // udp or tcp
}

// Reply is the server's reply to a query.
type Reply struct {
	RCode     dnsmessage.RCode
	Addrs     []string // only those of the family asked for are sent
	Truncated bool
	Silent    bool
}

// Serve answers A and AAAA questions on a loopback port, over UDP and TCP. reply is
// called concurrently and may block.
func Serve(t *testing.T, reply func(Query) Reply) (address string) {
	t.Helper()
	packets, streams := listen(t)
	t.Cleanup(func() { packets.Close() })
	go func() {
		for {
			b := make([]byte, 1500)
			n, from, err := packets.ReadFrom(b)
			if err != nil {
				return
			}
			go func() {
				if message := answerTo(b[:n], from, reply); message != nil {
					_, _ = packets.WriteTo(message, from)
				}
			}()
		}
	}()
	t.Cleanup(func() { streams.Close() })
	go func() {
		for {
			conn, err := streams.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				var size [2]byte
				if _, err := io.ReadFull(conn, size[:]); err != nil {
					return
				}
				b := make([]byte, binary.BigEndian.Uint16(size[:]))
				if _, err := io.ReadFull(conn, b); err != nil {
					return
				}
				message := answerTo(b, conn.RemoteAddr(), reply)
				if message == nil {
					_, _ = io.Copy(io.Discard, conn)
					return
				}
				for _, b := range binary.BigEndian.AppendUint16(nil, uint16(len(message))) {
					_, _ = conn.Write([]byte{b}) // a response may arrive in pieces
				}
				_, _ = conn.Write(message)
			}()
		}
	}()
	return streams.Addr().String()
}

// listen returns sockets for UDP and TCP with the same address.
func listen(t *testing.T) (net.PacketConn, net.Listener) {
	t.Helper()
	var last error
	for range 100 { // another process may have the port for UDP
		streams, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		packets, err := net.ListenPacket("udp4", streams.Addr().String())
		if err == nil {
			return packets, streams
		}
		streams.Close()
		last = err
	}
	t.Fatal(last)
	return nil, nil
}

// answerTo returns the message that answers a query, or nil for none.
func answerTo(b []byte, from net.Addr, reply func(Query) Reply) []byte {
	var m dnsmessage.Message
	if err := m.Unpack(b); err != nil || len(m.Questions) != 1 {
		return nil
	}
	q := m.Questions[0]
	ipv6 := q.Type == dnsmessage.TypeAAAA
	a := reply(Query{strings.TrimSuffix(strings.ToLower(q.Name.String()), "."), ipv6, from.String(), from.Network()})
	if a.Silent {
		return nil
	}
	m.Response, m.RecursionAvailable, m.Additionals = true, true, nil
	m.RCode, m.Truncated = a.RCode, a.Truncated
	for _, s := range a.Addrs {
		addr := netip.MustParseAddr(s)
		header := dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class, TTL: 1}
		switch {
		case addr.Is4() && !ipv6:
			m.Answers = append(m.Answers, dnsmessage.Resource{Header: header, Body: &dnsmessage.AResource{A: addr.As4()}})
		case addr.Is6() && ipv6:
			m.Answers = append(m.Answers, dnsmessage.Resource{Header: header, Body: &dnsmessage.AAAAResource{AAAA: addr.As16()}})
		}
	}
	message, err := m.Pack()
	if err != nil {
		return nil
	}
	return message
}

// Closed returns an address at which UDP questions are refused: its socket is connected
// elsewhere.
func Closed(t *testing.T) string {
	t.Helper()
	here := &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}
	conn, err := net.DialUDP("udp4", here, &net.UDPAddr{IP: here.IP, Port: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn.LocalAddr().String()
}
