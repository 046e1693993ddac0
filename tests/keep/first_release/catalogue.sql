--
-- PostgreSQL database dump
--


-- Dumped from database version 15.18 (Debian 15.18-0+deb12u1)
-- Dumped by pg_dump version 15.18 (Debian 15.18-0+deb12u1)

SET statement_timeout = 0;
SET lock_timeout = 0;
SET idle_in_transaction_session_timeout = 0;
SET client_encoding = 'UTF8';
SET standard_conforming_strings = on;
SELECT pg_catalog.set_config('search_path', '', false);
SET check_function_bodies = false;
SET xmloption = content;
SET client_min_messages = warning;
SET row_security = off;

SET default_tablespace = '';

SET default_table_access_method = heap;

--
-- Name: alembic_version; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.alembic_version (
    version_num character varying(32) NOT NULL
);


--
-- Name: delivery; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.delivery (
    id integer NOT NULL,
    result_id integer NOT NULL,
    study_uid character varying(64) NOT NULL,
    destination character varying(64) NOT NULL,
    state character varying(16) NOT NULL,
    attempts integer NOT NULL,
    created_at bigint NOT NULL,
    next_attempt_at bigint,
    claimed_until bigint,
    tried_at bigint,
    reason text NOT NULL,
    edition integer NOT NULL,
    sent_at bigint
);


--
-- Name: delivery_id_seq; Type: SEQUENCE; Schema: public; Owner: -
--

CREATE SEQUENCE public.delivery_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;


--
-- Name: delivery_id_seq; Type: SEQUENCE OWNED BY; Schema: public; Owner: -
--

ALTER SEQUENCE public.delivery_id_seq OWNED BY public.delivery.id;


--
-- Name: document; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.document (
    delivery_id integer NOT NULL,
    edition integer NOT NULL,
    sop_class_uid character varying(64) NOT NULL,
    sop_uid character varying(64) NOT NULL,
    series_uid character varying(64) NOT NULL,
    sha256 character varying(64) NOT NULL,
    stamped_at bigint NOT NULL
);


--
-- Name: dropped_term; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.dropped_term (
    keyword character varying(64) NOT NULL,
    term character varying(64) NOT NULL,
    count integer NOT NULL,
    first_at bigint NOT NULL,
    last_at bigint NOT NULL
);


--
-- Name: flag; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.flag (
    name character varying(64) NOT NULL,
    value character varying(64) NOT NULL
);


--
-- Name: held; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.held (
    id character varying(64) NOT NULL,
    reason character varying(64) NOT NULL,
    detail text NOT NULL,
    modality character varying(16) NOT NULL,
    sop_class_uid character varying(64) NOT NULL,
    study_uid character varying(64) NOT NULL,
    sop_uid character varying(64) NOT NULL,
    pid character varying(64) NOT NULL,
    calling_ae character varying(16) NOT NULL,
    purpose character varying(16) NOT NULL,
    held_at bigint NOT NULL
);


--
-- Name: history; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.history (
    id integer NOT NULL,
    at bigint NOT NULL,
    by character varying(64) NOT NULL,
    what character varying(64) NOT NULL,
    subject character varying(128) NOT NULL,
    reason text NOT NULL
);


--
-- Name: history_id_seq; Type: SEQUENCE; Schema: public; Owner: -
--

CREATE SEQUENCE public.history_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;


--
-- Name: history_id_seq; Type: SEQUENCE OWNED BY; Schema: public; Owner: -
--

ALTER SEQUENCE public.history_id_seq OWNED BY public.history.id;


--
-- Name: instance; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.instance (
    sop_uid character varying(64) NOT NULL,
    series_uid character varying(64) NOT NULL,
    study_uid character varying(64) NOT NULL,
    pid character varying(64) NOT NULL,
    sop_class_uid character varying(64) NOT NULL,
    transfer_syntax_uid character varying(64) NOT NULL,
    path text NOT NULL,
    header_digest character varying(64) NOT NULL,
    pixel_digest character varying(64) NOT NULL,
    modality character varying(16) NOT NULL,
    body_part character varying(64) NOT NULL,
    age_years integer,
    sex character varying(16) NOT NULL,
    device character varying(64) NOT NULL,
    accession_key character varying(64) NOT NULL,
    study_id_key character varying(64) NOT NULL,
    pixels_checked boolean NOT NULL,
    received_at bigint NOT NULL,
    seen_at bigint NOT NULL
);


--
-- Name: label; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.label (
    study_uid character varying(64) NOT NULL,
    sop_uid character varying(64) NOT NULL,
    reader character varying(64) NOT NULL,
    pid character varying(64) NOT NULL,
    label character varying(64) NOT NULL,
    labelled_on character varying(10) NOT NULL,
    confirmed_by character varying(16) NOT NULL,
    first_treatment_on character varying(10) NOT NULL,
    imported_at bigint NOT NULL
);


--
-- Name: patient; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.patient (
    pid character varying(64) NOT NULL,
    locked boolean NOT NULL,
    first_at bigint NOT NULL
);


--
-- Name: result; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.result (
    id integer NOT NULL,
    study_uid character varying(64) NOT NULL,
    model_id character varying(128) NOT NULL,
    content_digest character varying(64) NOT NULL,
    settings_digest character varying(64) NOT NULL,
    findings text NOT NULL,
    created_at bigint NOT NULL,
    run integer NOT NULL,
    predecessor integer,
    destinations text NOT NULL
);


--
-- Name: result_id_seq; Type: SEQUENCE; Schema: public; Owner: -
--

CREATE SEQUENCE public.result_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;


--
-- Name: result_id_seq; Type: SEQUENCE OWNED BY; Schema: public; Owner: -
--

ALTER SEQUENCE public.result_id_seq OWNED BY public.result.id;


--
-- Name: role; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.role (
    name character varying(64) NOT NULL,
    host character varying(255) NOT NULL,
    pid integer NOT NULL,
    seen_at bigint NOT NULL,
    told text NOT NULL
);


--
-- Name: run; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.run (
    id integer NOT NULL,
    kind character varying(64) NOT NULL,
    folder text NOT NULL,
    started_at bigint NOT NULL,
    finished_at bigint,
    outcome character varying(64) NOT NULL,
    model_id character varying(128) NOT NULL,
    decision character varying(64) NOT NULL
);


--
-- Name: run_id_seq; Type: SEQUENCE; Schema: public; Owner: -
--

CREATE SEQUENCE public.run_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;


--
-- Name: run_id_seq; Type: SEQUENCE OWNED BY; Schema: public; Owner: -
--

ALTER SEQUENCE public.run_id_seq OWNED BY public.run.id;


--
-- Name: study; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.study (
    uid character varying(64) NOT NULL,
    pid character varying(64) NOT NULL,
    state character varying(16) NOT NULL,
    purpose character varying(16) NOT NULL,
    calling_ae character varying(16) NOT NULL,
    first_at bigint NOT NULL,
    round_at bigint NOT NULL,
    last_at bigint NOT NULL,
    state_at bigint NOT NULL,
    late boolean NOT NULL,
    attempts integer NOT NULL,
    next_attempt_at bigint,
    claimed_until bigint,
    reason text NOT NULL,
    result_id integer
);


--
-- Name: delivery id; Type: DEFAULT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.delivery ALTER COLUMN id SET DEFAULT nextval('public.delivery_id_seq'::regclass);


--
-- Name: history id; Type: DEFAULT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.history ALTER COLUMN id SET DEFAULT nextval('public.history_id_seq'::regclass);


--
-- Name: result id; Type: DEFAULT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.result ALTER COLUMN id SET DEFAULT nextval('public.result_id_seq'::regclass);


--
-- Name: run id; Type: DEFAULT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.run ALTER COLUMN id SET DEFAULT nextval('public.run_id_seq'::regclass);


--
-- Data for Name: alembic_version; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.alembic_version VALUES ('0001');


--
-- Data for Name: delivery; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.delivery VALUES (1, 1, 'delivered', 'main', 'sent', 1, 1772654520000000, NULL, NULL, 1772654520000000, '', 1, 1772654520000000);
INSERT INTO public.delivery VALUES (2, 1, 'delivered', 'second', 'sent', 1, 1772654520000000, NULL, NULL, 1772654520000000, '', 1, 1772654520000000);
INSERT INTO public.delivery VALUES (3, 2, 'revised', 'main', 'sent', 1, 1772654640000000, NULL, NULL, 1772654640000000, '', 1, 1772654640000000);
INSERT INTO public.delivery VALUES (4, 3, 'revised', 'main', 'sent', 1, 1772654760000000, NULL, NULL, 1772654760000000, '', 1, 1772654760000000);
INSERT INTO public.delivery VALUES (5, 4, 'modality', 'main', 'sent', 1, 1772654880000000, NULL, NULL, 1772654880000000, '', 1, 1772654880000000);
INSERT INTO public.delivery VALUES (6, 5, 'delivering', 'main', 'sent', 0, 1772655600000000, NULL, NULL, NULL, '', 1, 1772655600000000);
INSERT INTO public.delivery VALUES (7, 5, 'delivering', 'second', 'pending', 0, 1772655600000000, 1772657400000000, NULL, NULL, 'away', 1, NULL);
INSERT INTO public.delivery VALUES (8, 6, 'late', 'main', 'sent', 0, 1772655780000000, NULL, NULL, NULL, '', 1, 1772655780000000);
INSERT INTO public.delivery VALUES (9, 6, 'late', 'second', 'pending', 0, 1772655780000000, 1772657580000000, NULL, NULL, 'away', 1, NULL);
INSERT INTO public.delivery VALUES (10, 7, 'stuck', 'main', 'held', 0, 1772655960000000, NULL, NULL, NULL, 'the PACS names another patient', 1, NULL);
INSERT INTO public.delivery VALUES (11, 7, 'stuck', 'second', 'dead', 0, 1772655960000000, NULL, NULL, NULL, 'refused', 1, NULL);


--
-- Data for Name: document; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.document VALUES (1, 1, '1.2.840.10008.5.1.4.1.1.88.33', '2.25.1.1', '2.25.1.1.1', '1.10000000000000000000000000000000000000000000000000000000000000', 1772654520000000);
INSERT INTO public.document VALUES (2, 1, '1.2.840.10008.5.1.4.1.1.88.33', '2.25.1.1', '2.25.1.1.1', '1.10000000000000000000000000000000000000000000000000000000000000', 1772654520000000);
INSERT INTO public.document VALUES (3, 1, '1.2.840.10008.5.1.4.1.1.88.33', '2.25.2.1', '2.25.2.1.1', '2.10000000000000000000000000000000000000000000000000000000000000', 1772654640000000);
INSERT INTO public.document VALUES (4, 1, '1.2.840.10008.5.1.4.1.1.88.33', '2.25.3.1', '2.25.3.1.1', '3.10000000000000000000000000000000000000000000000000000000000000', 1772654760000000);
INSERT INTO public.document VALUES (5, 1, '1.2.840.10008.5.1.4.1.1.88.33', '2.25.4.1', '2.25.4.1.1', '4.10000000000000000000000000000000000000000000000000000000000000', 1772654880000000);
INSERT INTO public.document VALUES (6, 1, '1.2.840.10008.5.1.4.1.1.88.33', '2.25.5.1', '2.25.5.1.1', '5.10000000000000000000000000000000000000000000000000000000000000', 1772655600000000);
INSERT INTO public.document VALUES (8, 1, '1.2.840.10008.5.1.4.1.1.88.33', '2.25.6.1', '2.25.6.1.1', '6.10000000000000000000000000000000000000000000000000000000000000', 1772655780000000);


--
-- Data for Name: dropped_term; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.dropped_term VALUES ('ViewPosition', 'hash-2', 1, 1772656320000000, 1772656320000000);
INSERT INTO public.dropped_term VALUES ('BodyPartExamined', 'hash-1', 2, 1772656320000000, 1772656320000000);


--
-- Data for Name: flag; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.flag VALUES ('answers', 'paused');


--
-- Data for Name: held; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.held VALUES ('held-quarantined-1-PATIENT_CONFLICT', 'another patient in this study', '', 'MG', '1.2.840.10008.5.1.4.1.1.1.2', 'quarantined', 'quarantined.9.1', '', 'PACS', 'answer', 1772654760000000);
INSERT INTO public.held VALUES ('held-modality-1-MODALITY', 'modality', '', 'MG', '1.2.840.10008.5.1.4.1.1.1.2', 'modality', 'modality.9.1', 'OST-modality', 'PACS', 'answer', 1772654760000000);
INSERT INTO public.held VALUES ('224cfe073979d55bd58bd2ea8f92a330', 'burned-in annotation', 'Burned In Annotation is not NO: the pixels may show who the patient is', 'DX', '1.2.840.10008.5.1.4.1.1.1.1', '2.25.241514012132626296649480798418352951132', '2.25.301719195854413089494961946412650443205', 'OST-CS4XXDNTVVVJZAVO', 'SENDER', 'answer', 1772656740000000);


--
-- Data for Name: history; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.history VALUES (1, 1772656320000000, 'operator', 'labels imported', 'labels', '2 labels');
INSERT INTO public.history VALUES (2, 1772656320000000, 'operator', 'label changed', 'learned', 'osteomyelitis by reader-1 on 2026-03-02 became ewing on 2026-03-03');
INSERT INTO public.history VALUES (3, 1772656320000000, 'operator', 'labels imported', 'labels', '1 labels');
INSERT INTO public.history VALUES (4, 1772656320000000, 'operator', 'answers: paused', 'answers', 'a test of the PACS');
INSERT INTO public.history VALUES (5, 1772656320000000, 'operator', 'quarantine: discarded', 'held-quarantined-2-DIGITISED', 'a scan');


--
-- Data for Name: instance; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.instance VALUES ('expired.9.1', 'expired.9', 'expired', 'OST-expired', '1.2.840.10008.5.1.4.1.1.1', '1.2.840.10008.1.2.1', 'expired/1.dcm', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb', 'CR', 'KNEE', 12, 'F', 'device', 'accession-expired', 'id-expired', false, 1772366400000000, 1772366400000000);
INSERT INTO public.instance VALUES ('learned.9.1', 'learned.9', 'learned', 'OST-learned', '1.2.840.10008.5.1.4.1.1.1', '1.2.840.10008.1.2.1', 'learned/1.dcm', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb', 'CR', 'KNEE', 12, 'F', 'device', 'accession-learned', 'id-learned', false, 1772654400000000, 1772654400000000);
INSERT INTO public.instance VALUES ('delivered.9.1', 'delivered.9', 'delivered', 'OST-delivered', '1.2.840.10008.5.1.4.1.1.1', '1.2.840.10008.1.2.1', 'delivered/1.dcm', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb', 'CR', 'KNEE', 12, 'F', 'device', 'accession-delivered', 'id-delivered', false, 1772654400000000, 1772654400000000);
INSERT INTO public.instance VALUES ('delivered.9.2', 'delivered.9', 'delivered', 'OST-delivered', '1.2.840.10008.5.1.4.1.1.1', '1.2.840.10008.1.2.1', 'delivered/2.dcm', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb', 'CR', 'KNEE', 12, 'F', 'device', 'accession-delivered', 'id-delivered', false, 1772654400000000, 1772654400000000);
INSERT INTO public.instance VALUES ('revised.9.1', 'revised.9', 'revised', 'OST-revised', '1.2.840.10008.5.1.4.1.1.1', '1.2.840.10008.1.2.1', 'revised/1.dcm', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb', 'CR', 'KNEE', 12, 'F', 'device', 'accession-revised', 'id-revised', false, 1772654520000000, 1772654520000000);
INSERT INTO public.instance VALUES ('revised.9.2', 'revised.9', 'revised', 'OST-revised', '1.2.840.10008.5.1.4.1.1.1', '1.2.840.10008.1.2.1', 'revised/2.dcm', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb', 'CR', 'KNEE', 12, 'F', 'device', 'accession-revised', 'id-revised', false, 1772654640000000, 1772654640000000);
INSERT INTO public.instance VALUES ('waiting.9.1', 'waiting.9', 'waiting', 'OST-waiting', '1.2.840.10008.5.1.4.1.1.1', '1.2.840.10008.1.2.1', 'waiting/1.dcm', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb', 'CR', 'KNEE', 12, 'F', 'device', 'accession-waiting', 'id-waiting', false, 1772654880000000, 1772654880000000);
INSERT INTO public.instance VALUES ('failed.9.1', 'failed.9', 'failed', 'OST-failed', '1.2.840.10008.5.1.4.1.1.1', '1.2.840.10008.1.2.1', 'failed/1.dcm', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb', 'CR', 'KNEE', 12, 'F', 'device', 'accession-failed', 'id-failed', false, 1772655060000000, 1772655060000000);
INSERT INTO public.instance VALUES ('put off.9.1', 'put off.9', 'put off', 'OST-put off', '1.2.840.10008.5.1.4.1.1.1', '1.2.840.10008.1.2.1', 'put off/1.dcm', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb', 'CR', 'KNEE', 12, 'F', 'device', 'accession-put off', 'id-put off', false, 1772655240000000, 1772655240000000);
INSERT INTO public.instance VALUES ('delivering.9.1', 'delivering.9', 'delivering', 'OST-delivering', '1.2.840.10008.5.1.4.1.1.1', '1.2.840.10008.1.2.1', 'delivering/1.dcm', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb', 'CR', 'KNEE', 12, 'F', 'device', 'accession-delivering', 'id-delivering', false, 1772655420000000, 1772655420000000);
INSERT INTO public.instance VALUES ('late.9.1', 'late.9', 'late', 'OST-late', '1.2.840.10008.5.1.4.1.1.1', '1.2.840.10008.1.2.1', 'late/1.dcm', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb', 'CR', 'KNEE', 12, 'F', 'device', 'accession-late', 'id-late', false, 1772655600000000, 1772655600000000);
INSERT INTO public.instance VALUES ('late.9.2', 'late.9', 'late', 'OST-late', '1.2.840.10008.5.1.4.1.1.1', '1.2.840.10008.1.2.1', 'late/2.dcm', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb', 'CR', 'KNEE', 12, 'F', 'device', 'accession-late', 'id-late', false, 1772655780000000, 1772655780000000);
INSERT INTO public.instance VALUES ('stuck.9.1', 'stuck.9', 'stuck', 'OST-stuck', '1.2.840.10008.5.1.4.1.1.1', '1.2.840.10008.1.2.1', 'stuck/1.dcm', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb', 'CR', 'KNEE', 12, 'F', 'device', 'accession-stuck', 'id-stuck', false, 1772655780000000, 1772655780000000);
INSERT INTO public.instance VALUES ('inferred.9.1', 'inferred.9', 'inferred', 'OST-inferred', '1.2.840.10008.5.1.4.1.1.1', '1.2.840.10008.1.2.1', 'inferred/1.dcm', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb', 'CR', 'KNEE', 12, 'F', 'device', 'accession-inferred', 'id-inferred', false, 1772655960000000, 1772655960000000);
INSERT INTO public.instance VALUES ('inferring.9.1', 'inferring.9', 'inferring', 'OST-inferring', '1.2.840.10008.5.1.4.1.1.1', '1.2.840.10008.1.2.1', 'inferring/1.dcm', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb', 'CR', 'KNEE', 12, 'F', 'device', 'accession-inferring', 'id-inferring', false, 1772656140000000, 1772656140000000);
INSERT INTO public.instance VALUES ('complete.9.1', 'complete.9', 'complete', 'OST-complete', '1.2.840.10008.5.1.4.1.1.1', '1.2.840.10008.1.2.1', 'complete/1.dcm', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb', 'CR', 'KNEE', 12, 'F', 'device', 'accession-complete', 'id-complete', false, 1772656500000000, 1772656500000000);
INSERT INTO public.instance VALUES ('receiving.9.1', 'receiving.9', 'receiving', 'OST-receiving', '1.2.840.10008.5.1.4.1.1.1', '1.2.840.10008.1.2.1', 'receiving/1.dcm', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb', 'CR', 'KNEE', 12, 'F', 'device', 'accession-receiving', 'id-receiving', false, 1772656680000000, 1772656680000000);
INSERT INTO public.instance VALUES ('2.25.174595521224437308071988545723926807223', '2.25.274567998215211381460578815385418791220', '2.25.223687319422944328683772630973399312910', 'OST-RTJOXIC7MLC2FV7N', '1.2.840.10008.5.1.4.1.1.1.1', '1.2.840.10008.1.2.1', 'OST-RTJOXIC7MLC2FV7N/2.25.223687319422944328683772630973399312910/2.25.274567998215211381460578815385418791220/2.25.174595521224437308071988545723926807223.dcm', 'f31a956c9582c30f413a821cd576003242255fc29036eb8340153c593a97d291', '25bfe1e905bc5de7cf3e28411a0fd2a6a75f450731acc965752e10dc5322f0bf', 'DX', 'LEG', 12, 'M', '44e6c6c8ef349302e496455ee47c2670', '4223ad6ebedcbd0956b2c115c5a3b154', '07dc4c83d15af7cdf5d050a50f889b51', false, 1772656740000000, 1772656740000000);
INSERT INTO public.instance VALUES ('2.25.102947123917704212046214204851367592180', '2.25.274567998215211381460578815385418791220', '2.25.223687319422944328683772630973399312910', 'OST-RTJOXIC7MLC2FV7N', '1.2.840.10008.5.1.4.1.1.1.1', '1.2.840.10008.1.2.1', 'OST-RTJOXIC7MLC2FV7N/2.25.223687319422944328683772630973399312910/2.25.274567998215211381460578815385418791220/2.25.102947123917704212046214204851367592180.dcm', 'a4658ffc067cc7ee260fd4a548b44ee508e7570a9a2453f9df71a8249ae4b7cc', '71535ceffdca45434227ba4b76012e4f23d17ad24d558730c2f036a68823dd33', 'DX', 'LEG', 12, 'M', '44e6c6c8ef349302e496455ee47c2670', '4223ad6ebedcbd0956b2c115c5a3b154', '07dc4c83d15af7cdf5d050a50f889b51', false, 1772656740000000, 1772656740000000);
INSERT INTO public.instance VALUES ('2.25.228747984837151669067842529629485922657', '2.25.21229132116296460077683202065679183318', '2.25.184706328659355072056277597319257012010', 'OST-S3G6DEUK2MXKDEOG', '1.2.840.10008.5.1.4.1.1.1.1', '1.2.840.10008.1.2.1', 'OST-S3G6DEUK2MXKDEOG/2.25.184706328659355072056277597319257012010/2.25.21229132116296460077683202065679183318/2.25.228747984837151669067842529629485922657.dcm', '4c6ed311a5e4952e255ed7603e060a2266af59561ef9a0fe63f2d3347330fffe', '25bfe1e905bc5de7cf3e28411a0fd2a6a75f450731acc965752e10dc5322f0bf', 'DX', 'LEG', 12, 'F', '44e6c6c8ef349302e496455ee47c2670', 'd65d66505468bbf2227617bcd9f94148', '07dc4c83d15af7cdf5d050a50f889b51', false, 1772656740000000, 1772656740000000);


--
-- Data for Name: label; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.label VALUES ('delivered', '', 'reader-1', 'OST-delivered', 'ewing', '2026-03-02', 'histology', '2026-03-05', 1772656320000000);
INSERT INTO public.label VALUES ('learned', 'learned.9.1', 'reader-1', 'OST-learned', 'ewing', '2026-03-03', 'histology', '', 1772656320000000);


--
-- Data for Name: patient; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.patient VALUES ('OST-expired', false, 1772366400000000);
INSERT INTO public.patient VALUES ('OST-learned', true, 1772654400000000);
INSERT INTO public.patient VALUES ('OST-delivered', false, 1772654400000000);
INSERT INTO public.patient VALUES ('OST-revised', false, 1772654520000000);
INSERT INTO public.patient VALUES ('OST-waiting', false, 1772654880000000);
INSERT INTO public.patient VALUES ('OST-failed', false, 1772655060000000);
INSERT INTO public.patient VALUES ('OST-put off', false, 1772655240000000);
INSERT INTO public.patient VALUES ('OST-delivering', false, 1772655420000000);
INSERT INTO public.patient VALUES ('OST-late', false, 1772655600000000);
INSERT INTO public.patient VALUES ('OST-stuck', false, 1772655780000000);
INSERT INTO public.patient VALUES ('OST-inferred', false, 1772655960000000);
INSERT INTO public.patient VALUES ('OST-inferring', false, 1772656140000000);
INSERT INTO public.patient VALUES ('OST-complete', false, 1772656500000000);
INSERT INTO public.patient VALUES ('OST-receiving', true, 1772656680000000);
INSERT INTO public.patient VALUES ('OST-RTJOXIC7MLC2FV7N', false, 1772656740000000);
INSERT INTO public.patient VALUES ('OST-S3G6DEUK2MXKDEOG', false, 1772656740000000);


--
-- Data for Name: result; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.result VALUES (1, 'delivered', 'v1', '95aac580da24a8175fbd78df764c32705b725213609531c62df569fac0fc79be', 's', '{"abstention":null,"body_part":"KNEE","chosen":0,"classes":[{"meaning":"Ewing sarcoma","scheme":"SCT","value":"254643008"},{"meaning":"Osteomyelitis","scheme":"SCT","value":"409780009"}],"degraded":"","images":[],"in_corpus":false,"model_id":"v1","model_name":"Osteon","parameters":[],"probabilities":[0.75,0.25],"probability_names":[{"meaning":"Ewing sarcoma","scheme":"SCT","value":"254643008"},{"meaning":"Osteomyelitis","scheme":"SCT","value":"409780009"}],"rule":"mean","study_uid":"delivered","training_mix":"1/1","weights_sha256":"cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"}', 1772654520000000, 1, NULL, '["main", "second"]');
INSERT INTO public.result VALUES (2, 'revised', 'v1', 'c63d1689d6b8ddfc8a39c69faaa6d2720fd6cbf929b4b7c419acae47582b681c', 's', '{"abstention":null,"body_part":"KNEE","chosen":0,"classes":[{"meaning":"Ewing sarcoma","scheme":"SCT","value":"254643008"},{"meaning":"Osteomyelitis","scheme":"SCT","value":"409780009"}],"degraded":"","images":[],"in_corpus":false,"model_id":"v1","model_name":"Osteon","parameters":[],"probabilities":[0.75,0.25],"probability_names":[{"meaning":"Ewing sarcoma","scheme":"SCT","value":"254643008"},{"meaning":"Osteomyelitis","scheme":"SCT","value":"409780009"}],"rule":"mean","study_uid":"revised","training_mix":"1/1","weights_sha256":"cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"}', 1772654640000000, 1, NULL, '["main"]');
INSERT INTO public.result VALUES (3, 'revised', 'v2', '3e15ab94c8725fa8678b7b199e1c2b6903b4dd9b8094716c8cdd966c92ea2810', 's', '{"abstention":null,"body_part":"KNEE","chosen":0,"classes":[{"meaning":"Ewing sarcoma","scheme":"SCT","value":"254643008"},{"meaning":"Osteomyelitis","scheme":"SCT","value":"409780009"}],"degraded":"","images":[],"in_corpus":false,"model_id":"v2","model_name":"Osteon","parameters":[],"probabilities":[0.75,0.25],"probability_names":[{"meaning":"Ewing sarcoma","scheme":"SCT","value":"254643008"},{"meaning":"Osteomyelitis","scheme":"SCT","value":"409780009"}],"rule":"mean","study_uid":"revised","training_mix":"1/1","weights_sha256":"cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"}', 1772654760000000, 2, 2, '["main"]');
INSERT INTO public.result VALUES (4, 'modality', 'v1', '57404ecce6886b7f89d4c7914b403f19fa1f2549f24fad9afcaf664a0b8636a1', 's', '{"abstention":null,"body_part":"KNEE","chosen":0,"classes":[{"meaning":"Ewing sarcoma","scheme":"SCT","value":"254643008"},{"meaning":"Osteomyelitis","scheme":"SCT","value":"409780009"}],"degraded":"","images":[],"in_corpus":false,"model_id":"v1","model_name":"Osteon","parameters":[],"probabilities":[0.75,0.25],"probability_names":[{"meaning":"Ewing sarcoma","scheme":"SCT","value":"254643008"},{"meaning":"Osteomyelitis","scheme":"SCT","value":"409780009"}],"rule":"mean","study_uid":"modality","training_mix":"1/1","weights_sha256":"cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"}', 1772654880000000, 1, NULL, '["main"]');
INSERT INTO public.result VALUES (5, 'delivering', 'v1', 'b57dd730ea5f4376e7c49dca00d37e966fe754f910f9d7fbedf1c495fb647962', 's', '{"abstention":null,"body_part":"KNEE","chosen":0,"classes":[{"meaning":"Ewing sarcoma","scheme":"SCT","value":"254643008"},{"meaning":"Osteomyelitis","scheme":"SCT","value":"409780009"}],"degraded":"","images":[],"in_corpus":false,"model_id":"v1","model_name":"Osteon","parameters":[],"probabilities":[0.75,0.25],"probability_names":[{"meaning":"Ewing sarcoma","scheme":"SCT","value":"254643008"},{"meaning":"Osteomyelitis","scheme":"SCT","value":"409780009"}],"rule":"mean","study_uid":"delivering","training_mix":"1/1","weights_sha256":"cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"}', 1772655600000000, 1, NULL, '["main", "second"]');
INSERT INTO public.result VALUES (6, 'late', 'v1', '95aa1fbe29f00e9ba8a206c58420054d0f19954775b058e4ecf105cbd5bce7ea', 's', '{"abstention":null,"body_part":"KNEE","chosen":0,"classes":[{"meaning":"Ewing sarcoma","scheme":"SCT","value":"254643008"},{"meaning":"Osteomyelitis","scheme":"SCT","value":"409780009"}],"degraded":"","images":[],"in_corpus":false,"model_id":"v1","model_name":"Osteon","parameters":[],"probabilities":[0.75,0.25],"probability_names":[{"meaning":"Ewing sarcoma","scheme":"SCT","value":"254643008"},{"meaning":"Osteomyelitis","scheme":"SCT","value":"409780009"}],"rule":"mean","study_uid":"late","training_mix":"1/1","weights_sha256":"cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"}', 1772655780000000, 1, NULL, '["main", "second"]');
INSERT INTO public.result VALUES (7, 'stuck', 'v1', 'c95e3699252beb597b6300c29c29e4e21104e463d5795bbbdf147b35861562f3', 's', '{"abstention":null,"body_part":"KNEE","chosen":0,"classes":[{"meaning":"Ewing sarcoma","scheme":"SCT","value":"254643008"},{"meaning":"Osteomyelitis","scheme":"SCT","value":"409780009"}],"degraded":"","images":[],"in_corpus":false,"model_id":"v1","model_name":"Osteon","parameters":[],"probabilities":[0.75,0.25],"probability_names":[{"meaning":"Ewing sarcoma","scheme":"SCT","value":"254643008"},{"meaning":"Osteomyelitis","scheme":"SCT","value":"409780009"}],"rule":"mean","study_uid":"stuck","training_mix":"1/1","weights_sha256":"cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"}', 1772655960000000, 1, NULL, '["main", "second"]');
INSERT INTO public.result VALUES (8, 'inferred', 'v1', '6dbc18e50b9c30a36bae47027c24503417f3299efb7c41656adbdf21f893c918', 's', '{"abstention":null,"body_part":"KNEE","chosen":0,"classes":[{"meaning":"Ewing sarcoma","scheme":"SCT","value":"254643008"},{"meaning":"Osteomyelitis","scheme":"SCT","value":"409780009"}],"degraded":"","images":[],"in_corpus":false,"model_id":"v1","model_name":"Osteon","parameters":[],"probabilities":[0.75,0.25],"probability_names":[{"meaning":"Ewing sarcoma","scheme":"SCT","value":"254643008"},{"meaning":"Osteomyelitis","scheme":"SCT","value":"409780009"}],"rule":"mean","study_uid":"inferred","training_mix":"1/1","weights_sha256":"cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"}', 1772656140000000, 1, NULL, '["main", "second"]');


--
-- Data for Name: role; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.role VALUES ('reply', 'host-1', 4242, 1772656320000000, '{"model": "v2", "answers": "off"}');


--
-- Data for Name: run; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.run VALUES (1, 'fine-tune', 'runs/1', 1772656320000000, 1772659920000000, 'done', 'v2', 'insufficient evidence');
INSERT INTO public.run VALUES (2, 'fine-tune', 'runs/2', 1772663520000000, NULL, '', '', '');


--
-- Data for Name: study; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.study VALUES ('expired', 'OST-expired', 'expired', 'answer', 'PACS', 1772366400000000, 1772366400000000, 1772366400000000, 1772654400000000, false, 0, NULL, NULL, 'not answered in time: `osteon reply study` answers it by hand', NULL);
INSERT INTO public.study VALUES ('delivering', 'OST-delivering', 'delivering', 'answer', 'PACS', 1772655420000000, 1772655420000000, 1772655420000000, 1772655600000000, false, 0, NULL, NULL, '', 5);
INSERT INTO public.study VALUES ('learned', 'OST-learned', 'learned', 'learn', 'PACS', 1772654400000000, 1772654400000000, 1772654400000000, 1772654520000000, false, 0, NULL, NULL, '', NULL);
INSERT INTO public.study VALUES ('delivered', 'OST-delivered', 'delivered', 'answer', 'PACS', 1772654400000000, 1772654400000000, 1772654400000000, 1772654520000000, false, 0, NULL, NULL, '', 1);
INSERT INTO public.study VALUES ('revised', 'OST-revised', 'delivered', 'answer', 'PACS', 1772654520000000, 1772654640000000, 1772654640000000, 1772654760000000, false, 0, NULL, NULL, '', 3);
INSERT INTO public.study VALUES ('modality', 'OST-modality', 'delivered', 'answer', 'PACS', 1772654760000000, 1772654760000000, 1772654760000000, 1772654880000000, false, 0, NULL, NULL, '', 4);
INSERT INTO public.study VALUES ('waiting', 'OST-waiting', 'waiting', 'answer', 'PACS', 1772654880000000, 1772654880000000, 1772654880000000, 1772655060000000, false, 1, NULL, NULL, '', NULL);
INSERT INTO public.study VALUES ('failed', 'OST-failed', 'failed', 'answer', 'PACS', 1772655060000000, 1772655060000000, 1772655060000000, 1772655240000000, false, 1, NULL, NULL, 'no decoder', NULL);
INSERT INTO public.study VALUES ('put off', 'OST-put off', 'failed', 'answer', 'PACS', 1772655240000000, 1772655240000000, 1772655240000000, 1772655420000000, false, 1, 1772662620000000, NULL, 'busy', NULL);
INSERT INTO public.study VALUES ('late', 'OST-late', 'delivering', 'answer', 'PACS', 1772655600000000, 1772655600000000, 1772655780000000, 1772655780000000, true, 0, NULL, NULL, '', 6);
INSERT INTO public.study VALUES ('stuck', 'OST-stuck', 'delivering', 'answer', 'PACS', 1772655780000000, 1772655780000000, 1772655780000000, 1772655960000000, false, 0, NULL, NULL, '', 7);
INSERT INTO public.study VALUES ('inferred', 'OST-inferred', 'inferred', 'answer', 'PACS', 1772655960000000, 1772655960000000, 1772655960000000, 1772656140000000, false, 0, NULL, NULL, '', 8);
INSERT INTO public.study VALUES ('inferring', 'OST-inferring', 'inferring', 'answer', 'PACS', 1772656140000000, 1772656140000000, 1772656140000000, 1772656320000000, false, 1, NULL, 1772656620000000, '', NULL);
INSERT INTO public.study VALUES ('quarantined', 'OST-quarantined', 'quarantined', 'answer', 'PACS', 1772654760000000, 1772656320000000, 1772656320000000, 1772656680000000, false, 0, NULL, NULL, 'every image is in the quarantine: another patient in this study', NULL);
INSERT INTO public.study VALUES ('complete', 'OST-complete', 'complete', 'answer', 'PACS', 1772656500000000, 1772656500000000, 1772656500000000, 1772656680000000, false, 0, NULL, NULL, '', NULL);
INSERT INTO public.study VALUES ('receiving', 'OST-receiving', 'receiving', 'answer', 'PACS', 1772656680000000, 1772656680000000, 1772656680000000, 1772656680000000, false, 0, NULL, NULL, '', NULL);
INSERT INTO public.study VALUES ('2.25.223687319422944328683772630973399312910', 'OST-RTJOXIC7MLC2FV7N', 'receiving', 'answer', 'SENDER', 1772656740000000, 1772656740000000, 1772656740000000, 1772656740000000, false, 0, NULL, NULL, '', NULL);
INSERT INTO public.study VALUES ('2.25.184706328659355072056277597319257012010', 'OST-S3G6DEUK2MXKDEOG', 'receiving', 'answer', 'SENDER', 1772656740000000, 1772656740000000, 1772656740000000, 1772656740000000, false, 0, NULL, NULL, '', NULL);
INSERT INTO public.study VALUES ('2.25.241514012132626296649480798418352951132', 'OST-CS4XXDNTVVVJZAVO', 'receiving', 'answer', 'SENDER', 1772656740000000, 1772656740000000, 1772656740000000, 1772656740000000, false, 0, NULL, NULL, '', NULL);


--
-- Name: delivery_id_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.delivery_id_seq', 11, true);


--
-- Name: history_id_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.history_id_seq', 5, true);


--
-- Name: result_id_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.result_id_seq', 8, true);


--
-- Name: run_id_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.run_id_seq', 2, true);


--
-- Name: alembic_version alembic_version_pkc; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.alembic_version
    ADD CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num);


--
-- Name: delivery pk_delivery; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.delivery
    ADD CONSTRAINT pk_delivery PRIMARY KEY (id);


--
-- Name: document pk_document; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.document
    ADD CONSTRAINT pk_document PRIMARY KEY (delivery_id, edition);


--
-- Name: dropped_term pk_dropped_term; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.dropped_term
    ADD CONSTRAINT pk_dropped_term PRIMARY KEY (keyword, term);


--
-- Name: flag pk_flag; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.flag
    ADD CONSTRAINT pk_flag PRIMARY KEY (name);


--
-- Name: held pk_held; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.held
    ADD CONSTRAINT pk_held PRIMARY KEY (id);


--
-- Name: history pk_history; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.history
    ADD CONSTRAINT pk_history PRIMARY KEY (id);


--
-- Name: instance pk_instance; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.instance
    ADD CONSTRAINT pk_instance PRIMARY KEY (sop_uid);


--
-- Name: label pk_label; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.label
    ADD CONSTRAINT pk_label PRIMARY KEY (study_uid, sop_uid, reader);


--
-- Name: patient pk_patient; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.patient
    ADD CONSTRAINT pk_patient PRIMARY KEY (pid);


--
-- Name: result pk_result; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.result
    ADD CONSTRAINT pk_result PRIMARY KEY (id);


--
-- Name: role pk_role; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.role
    ADD CONSTRAINT pk_role PRIMARY KEY (name, host, pid);


--
-- Name: run pk_run; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.run
    ADD CONSTRAINT pk_run PRIMARY KEY (id);


--
-- Name: study pk_study; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.study
    ADD CONSTRAINT pk_study PRIMARY KEY (uid);


--
-- Name: delivery uq_delivery_result_id_destination; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.delivery
    ADD CONSTRAINT uq_delivery_result_id_destination UNIQUE (result_id, destination);


--
-- Name: result uq_result_same; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.result
    ADD CONSTRAINT uq_result_same UNIQUE (study_uid, content_digest, model_id, settings_digest);


--
-- Name: result uq_result_study_uid_run; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.result
    ADD CONSTRAINT uq_result_study_uid_run UNIQUE (study_uid, run);


--
-- Name: ix_delivery_state_next_attempt_at; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_delivery_state_next_attempt_at ON public.delivery USING btree (state, next_attempt_at);


--
-- Name: ix_delivery_study_uid; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_delivery_study_uid ON public.delivery USING btree (study_uid);


--
-- Name: ix_document_sop_uid; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_document_sop_uid ON public.document USING btree (sop_uid);


--
-- Name: ix_held_sop_uid; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_held_sop_uid ON public.held USING btree (sop_uid);


--
-- Name: ix_held_study_uid; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_held_study_uid ON public.held USING btree (study_uid);


--
-- Name: ix_history_subject; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_history_subject ON public.history USING btree (subject);


--
-- Name: ix_instance_accession_key; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_instance_accession_key ON public.instance USING btree (accession_key);


--
-- Name: ix_instance_pid; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_instance_pid ON public.instance USING btree (pid);


--
-- Name: ix_instance_series_uid; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_instance_series_uid ON public.instance USING btree (series_uid);


--
-- Name: ix_instance_study_id_key; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_instance_study_id_key ON public.instance USING btree (study_id_key);


--
-- Name: ix_instance_study_uid; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_instance_study_uid ON public.instance USING btree (study_uid);


--
-- Name: ix_study_pid; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_study_pid ON public.study USING btree (pid);


--
-- Name: ix_study_state_last_at; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_study_state_last_at ON public.study USING btree (state, last_at);


--
-- Name: delivery fk_delivery_result_id; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.delivery
    ADD CONSTRAINT fk_delivery_result_id FOREIGN KEY (result_id) REFERENCES public.result(id);


--
-- Name: delivery fk_delivery_study_uid; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.delivery
    ADD CONSTRAINT fk_delivery_study_uid FOREIGN KEY (study_uid) REFERENCES public.study(uid);


--
-- Name: document fk_document_delivery_id; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.document
    ADD CONSTRAINT fk_document_delivery_id FOREIGN KEY (delivery_id) REFERENCES public.delivery(id);


--
-- Name: instance fk_instance_pid; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.instance
    ADD CONSTRAINT fk_instance_pid FOREIGN KEY (pid) REFERENCES public.patient(pid);


--
-- Name: instance fk_instance_study_uid; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.instance
    ADD CONSTRAINT fk_instance_study_uid FOREIGN KEY (study_uid) REFERENCES public.study(uid);


--
-- Name: label fk_label_study_uid; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.label
    ADD CONSTRAINT fk_label_study_uid FOREIGN KEY (study_uid) REFERENCES public.study(uid);


--
-- Name: result fk_result_predecessor; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.result
    ADD CONSTRAINT fk_result_predecessor FOREIGN KEY (predecessor) REFERENCES public.result(id);


--
-- Name: result fk_result_study_uid; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.result
    ADD CONSTRAINT fk_result_study_uid FOREIGN KEY (study_uid) REFERENCES public.study(uid);


--
-- PostgreSQL database dump complete
--


