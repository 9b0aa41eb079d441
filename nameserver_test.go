// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
)

// nameServer answers A and AAAA questions with what answer returns for the n-th question
// about the name, and PTR questions with the names it returns.
func nameServer(t *testing.T, answer func(name string, n int) []string) string {
	t.Helper()
	return nameServerAt(t, "127.0.0.1:0", answer)
}

func nameServerAt(t *testing.T, address string, answer func(name string, n int) []string) string {
	t.Helper()
	socket, err := net.ListenPacket("udp4", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { socket.Close() })
	var mu sync.Mutex
	asked := map[string]int{}
	go func() {
		buf := make([]byte, 1500)
		for {
			n, from, err := socket.ReadFrom(buf)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if err := m.Unpack(buf[:n]); err != nil || len(m.Questions) != 1 {
				continue
			}
			q := m.Questions[0]
			name := strings.TrimSuffix(strings.ToLower(q.Name.String()), ".")
			mu.Lock()
			round := asked[name+q.Type.String()]
			asked[name+q.Type.String()]++
			mu.Unlock()
			m.Response, m.RecursionAvailable = true, true
			m.Additionals = nil
			owner := q.Name
			for _, data := range answer(name, round) {
				if alias, ok := strings.CutPrefix(data, "CNAME "); ok {
					target := dnsmessage.MustNewName(alias + ".")
					m.Answers = append(m.Answers, dnsmessage.Resource{
						Header: dnsmessage.ResourceHeader{Name: owner, Type: dnsmessage.TypeCNAME, Class: q.Class, TTL: 1},
						Body:   &dnsmessage.CNAMEResource{CNAME: target}})
					owner = target
					continue
				}
				if target, ok := strings.CutPrefix(data, "PTR "); ok {
					m.Answers = append(m.Answers, dnsmessage.Resource{
						Header: dnsmessage.ResourceHeader{Name: owner, Type: dnsmessage.TypePTR, Class: q.Class, TTL: 1},
						Body:   &dnsmessage.PTRResource{PTR: dnsmessage.MustNewName(target + ".")}})
					continue
				}
				addr := netip.MustParseAddr(data)
				header := dnsmessage.ResourceHeader{Name: owner, Type: q.Type, Class: q.Class, TTL: 1}
				if addr.Is4() && q.Type == dnsmessage.TypeA {
					m.Answers = append(m.Answers, dnsmessage.Resource{Header: header, Body: &dnsmessage.AResource{A: addr.As4()}})
				} else if addr.Is6() && q.Type == dnsmessage.TypeAAAA {
					m.Answers = append(m.Answers, dnsmessage.Resource{Header: header, Body: &dnsmessage.AAAAResource{AAAA: addr.As16()}})
				}
			}
			if len(m.Answers) == 0 && answer(name, round) == nil {
				m.RCode = dnsmessage.RCodeNameError
			}
			if packed, err := m.Pack(); err == nil {
				_, _ = socket.WriteTo(packed, from)
			}
		}
	}()
	return socket.LocalAddr().String()
}
